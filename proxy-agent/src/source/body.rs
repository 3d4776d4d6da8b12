//! Answers that must go on: a server that sends drop by drop, or stops in the middle, is as good as none.
//!
//! A watch may be silent for minutes, but not in the middle of a line. Anything else has to be whole in time.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tower::BoxError;

/// How long a line of a watch may take to arrive.
const LINE: Duration = Duration::from_secs(10);
/// How long an answer that is no watch may take. A real server gives up after a minute, too.
const WHOLE: Duration = Duration::from_secs(60);

/// It took too long.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the answer came too slowly: {0:?} were not enough")]
pub(super) struct TooSlow(Duration);

/// The body of an answer, and until when what has begun must be there.
pub(super) struct Guarded<B> {
    inner: B,
    watch: bool,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<B> Guarded<B> {
    /// Guards the body of a watch or of another answer.
    pub(super) fn new(inner: B, watch: bool) -> Self {
        let deadline = (!watch).then(|| Box::pin(sleep(WHOLE)));
        Self { inner, watch, deadline }
    }

    /// Takes note of what has come.
    fn came(&mut self, data: &[u8]) {
        if !self.watch || data.is_empty() {
            return;
        }
        if data.ends_with(b"\n") {
            self.deadline = None;
        } else if self.deadline.is_none() || data.contains(&b'\n') {
            self.deadline = Some(Box::pin(sleep(LINE)));
        }
    }
}

impl<B> Body for Guarded<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) {
            let Some(Ok(frame)) = frame else { return Poll::Ready(frame.map(|f| f.map_err(Into::into))) };
            if let Some(data) = frame.data_ref() {
                self.came(data);
            }
            let late = self.deadline.as_ref().is_some_and(|at| at.is_elapsed());
            if !late {
                // Armed here as well, for who sends a little all the time.
                if let Some(deadline) = &mut self.deadline {
                    let _ = deadline.as_mut().poll(context);
                }
                return Poll::Ready(Some(Ok(frame)));
            }
        } else {
            let Some(deadline) = &mut self.deadline else { return Poll::Pending };
            ready!(deadline.as_mut().poll(context));
        }
        let slow = TooSlow(if self.watch { LINE } else { WHOLE });
        Poll::Ready(Some(Err(slow.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{StreamExt, stream};

    use super::*;

    /// Sends these pieces, each after a pause; how many came.
    async fn pieces(pause: Duration, pieces: Vec<&'static [u8]>, watch: bool) -> Result<usize, String> {
        let pieces = stream::iter(pieces).then(move |piece| async move {
            sleep(pause).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(piece)))
        });
        let inner = Box::pin(axum::body::Body::from_stream(
            pieces.map(|frame| frame.map(|frame| frame.into_data().unwrap())),
        ));
        let mut frames = std::pin::pin!(Guarded::new(inner, watch));
        let mut count = 0;
        loop {
            match std::future::poll_fn(|context| frames.as_mut().poll_frame(context)).await {
                None => return Ok(count),
                Some(Ok(_)) => count += 1,
                Some(Err(error)) => return Err(error.to_string()),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_may_pause_between_lines_and_not_within_one() {
        let long = Duration::from_secs(200);
        assert_eq!(pieces(long, vec![b"{}\n", b"{}\n{}\n"], true).await, Ok(2));
        assert!(pieces(long, vec![b"{}\n{", b"}\n"], true).await.is_err());
        let drops = vec![&b"x"[..]; 30];
        assert!(pieces(Duration::from_secs(1), drops, true).await.is_err(), "drop by drop is no line");
        assert_eq!(pieces(Duration::from_secs(6), vec![b"{}\n{", b"}\n{", b"}\n"], true).await, Ok(3));
    }

    #[tokio::test(start_paused = true)]
    async fn any_other_answer_must_be_whole_in_time() {
        assert_eq!(pieces(Duration::from_secs(20), vec![b"a", b"b"], false).await, Ok(2));
        assert!(pieces(Duration::from_secs(1), vec![&b"x"[..]; 90], false).await.is_err());
        assert!(pieces(Duration::from_secs(500), vec![b"a"], false).await.is_err());
    }
}
