//! Time-outs and size limits for the bodies of answers: a server that sends byte by byte, stops half-way, or never stops is
//! as bad as one that is down.
//!
//! A watch may pause for minutes, but not within a line. Any other body has to be complete in time. Neither is larger than a
//! cluster can make it. (http-body-util and tower-http limit whole bodies, not lines.)

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
const LINE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long another body may take. A real server gives up after a minute, too.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of a line of a watch: one object. etcd accepts 1.5 MiB.
const LINE_LIMIT: usize = 16 << 20;
/// Bytes of another body: from its cache a server sends a whole list at once.
const BODY_LIMIT: usize = 512 << 20;
/// Bytes of the body of an error.
const ERROR_LIMIT: usize = 1 << 20;

#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(in crate::api) enum BodyError {
    #[error("the answer came too slowly: {0:?} were not enough")]
    TooSlow(Duration),
    #[error("the answer does not end: more than {} MiB came", .0 >> 20)]
    TooLarge(usize),
}

impl BodyError {
    /// Whether an error has one of these as a source.
    pub(in crate::api) fn is_cause_of(error: &(dyn Error + 'static)) -> bool {
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

/// The body of an answer, with its limits.
pub(in crate::api) struct LimitedBody<B> {
    inner: B,
    watch: bool,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Bytes of the line or of the answer so far.
    size: usize,
    limit: usize,
}

impl<B> LimitedBody<B> {
    /// Limits a body by the status of its answer and whether the request was a watch.
    pub(super) fn new(inner: B, status: StatusCode, watch: bool) -> Self {
        let watch = watch && status.is_success();
        let limit = match (status.is_success(), watch) {
            (false, _) => ERROR_LIMIT,
            (true, true) => LINE_LIMIT,
            (true, false) => BODY_LIMIT,
        };
        let deadline = (!watch).then(|| Box::pin(sleep(BODY_TIMEOUT)));
        Self { inner, watch, deadline, size: 0, limit }
    }

    /// Counts data and sets the deadline of the line.
    fn received(&mut self, data: &[u8]) {
        let end_of_line = self.watch.then(|| data.iter().rposition(|byte| *byte == b'\n')).flatten();
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
            self.deadline = Some(Box::pin(sleep(LINE_TIMEOUT)));
        }
    }
}

impl<B> Body for LimitedBody<B>
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
                self.received(data);
                if self.size > self.limit {
                    return Poll::Ready(Some(Err(BodyError::TooLarge(self.limit).into())));
                }
            }
            let late = self.deadline.as_ref().is_some_and(|at| at.is_elapsed());
            if !late {
                // Polled here as well, so that steady small frames do not keep it from firing.
                if let Some(deadline) = &mut self.deadline {
                    let _registered = deadline.as_mut().poll(context);
                }
                return Poll::Ready(Some(Ok(frame)));
            }
        } else {
            let Some(deadline) = &mut self.deadline else { return Poll::Pending };
            ready!(deadline.as_mut().poll(context));
        }
        let slow = BodyError::TooSlow(if self.watch { LINE_TIMEOUT } else { BODY_TIMEOUT });
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
        let mut frames = std::pin::pin!(LimitedBody::new(inner, StatusCode::OK, watch));
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
        assert!(pieces(Duration::from_secs(1), drops, true).await.is_err(), "byte by byte is too slow");
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
        let mut frames = LimitedBody::new(axum::body::Body::from_stream(pieces), status, watch);
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
            assert!(BodyError::is_cause_of(&*error), "{error}");
            // As `kube` passes it on.
            assert!(BodyError::is_cause_of(&kube::Error::ReadEvents(io::Error::other(error))));
        }
        assert!(!BodyError::is_cause_of(&kube::Error::ReadEvents(io::ErrorKind::BrokenPipe.into())));
    }
}
