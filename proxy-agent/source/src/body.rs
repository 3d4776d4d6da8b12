//! Answers that must go on, and end: a server that sends drop by drop, stops in the middle, or never stops is as good as none.
//!
//! A watch may be silent for minutes, but not in the middle of a line. Anything else has to be whole in time. Neither a line nor
//! another answer is larger than what a cluster can have in it.

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::StatusCode;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tower::BoxError;

/// How long a line of a watch may take to arrive.
const LINE: Duration = Duration::from_secs(10);
/// How long an answer that is no watch may take. A real server gives up after a minute, too.
const WHOLE: Duration = Duration::from_secs(60);

/// Bytes of a line of a watch: an object, of which etcd takes 1.5 MiB.
const LINE_SIZE: usize = 16 << 20;
/// Bytes of another answer: a server whose cache answers gives a whole list at once.
const WHOLE_SIZE: usize = 512 << 20;
/// Bytes of an answer that says why there is none.
const REFUSAL_SIZE: usize = 1 << 20;

/// An answer that is of no use.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(super) enum Unfit {
    /// It took too long.
    #[error("the answer came too slowly: {0:?} were not enough")]
    Slow(Duration),
    /// There was too much of it.
    #[error("the answer does not end: more than {} MiB came", .0 >> 20)]
    Endless(usize),
}

impl Unfit {
    /// Whether that is what an error comes from.
    pub(super) fn is_behind(error: &(dyn Error + 'static)) -> bool {
        let mut next = Some(error);
        while let Some(error) = next {
            if error.is::<Self>() {
                return true;
            }
            next = match error.downcast_ref::<io::Error>().map(io::Error::get_ref) {
                Some(inside) => inside.map(|inside| inside as &(dyn Error + 'static)),
                None => error.source(),
            };
        }
        false
    }
}

/// The body of an answer, and until when what has begun must be there.
pub(super) struct Guarded<B> {
    inner: B,
    watch: bool,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Bytes of the line or of the answer so far.
    size: usize,
    most: usize,
}

impl<B> Guarded<B> {
    /// Guards the body of an answer with this status, to a watch or to another request.
    pub(super) fn new(inner: B, status: StatusCode, watch: bool) -> Self {
        let watch = watch && status.is_success();
        let most = match (status.is_success(), watch) {
            (false, _) => REFUSAL_SIZE,
            (true, true) => LINE_SIZE,
            (true, false) => WHOLE_SIZE,
        };
        let deadline = (!watch).then(|| Box::pin(sleep(WHOLE)));
        Self { inner, watch, deadline, size: 0, most }
    }

    /// Takes note of what has come.
    fn came(&mut self, data: &[u8]) {
        let end_of_line = data.iter().rposition(|byte| *byte == b'\n').filter(|_| self.watch);
        self.size = match end_of_line {
            Some(at) => data.len() - at - 1,
            None => self.size + data.len(),
        };
        if !self.watch || data.is_empty() {
            return;
        }
        if data.ends_with(b"\n") {
            self.deadline = None;
        } else if self.deadline.is_none() || end_of_line.is_some() {
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
                if self.size > self.most {
                    return Poll::Ready(Some(Err(Unfit::Endless(self.most).into())));
                }
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
        let slow = Unfit::Slow(if self.watch { LINE } else { WHOLE });
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
        let mut frames = std::pin::pin!(Guarded::new(inner, StatusCode::OK, watch));
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

    /// How many MiB came of an answer that has this many, each of them a line where `lines` says so.
    async fn mebibytes(status: StatusCode, watch: bool, lines: bool, many: usize) -> Result<usize, BoxError> {
        let mut one = vec![b'x'; 1 << 20];
        if lines {
            one[(1 << 20) - 1] = b'\n';
        }
        let one = Bytes::from(one);
        let pieces = stream::iter((0..many).map(move |_| Ok::<_, Infallible>(one.clone())));
        let mut frames = Guarded::new(axum::body::Body::from_stream(pieces), status, watch);
        let mut count = 0;
        while let Some(frame) =
            std::future::poll_fn(|context| Pin::new(&mut frames).poll_frame(context)).await
        {
            count += frame?.into_data().map_or(0, |data| data.len() >> 20);
        }
        Ok(count)
    }

    #[tokio::test]
    async fn neither_a_line_nor_an_answer_is_without_end() {
        let refused = StatusCode::INTERNAL_SERVER_ERROR;
        assert_eq!(mebibytes(StatusCode::OK, true, true, 1000).await.unwrap(), 1000);
        assert_eq!(mebibytes(StatusCode::OK, false, false, 512).await.unwrap(), 512);
        assert_eq!(mebibytes(refused, false, false, 1).await.unwrap(), 1);
        for (status, watch, lines, many) in [
            (StatusCode::OK, true, false, 17),
            (StatusCode::OK, false, true, 513),
            (refused, false, false, 2),
            (refused, true, true, 2),
        ] {
            let error = mebibytes(status, watch, lines, many).await.unwrap_err();
            assert!(Unfit::is_behind(&*error), "{error}");
            // As `kube` passes it on.
            assert!(Unfit::is_behind(&kube::Error::ReadEvents(io::Error::other(error))));
        }
        assert!(!Unfit::is_behind(&kube::Error::ReadEvents(io::ErrorKind::BrokenPipe.into())));
    }
}
