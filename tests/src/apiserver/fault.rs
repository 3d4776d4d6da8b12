//! Every way in which an API server can be of no use, by name.

use std::convert::Infallible;
use std::str::FromStr;
use std::time::Duration;

use anyhow::bail;
use futures::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};

use super::http::Body;

/// How long a server that is slow takes for a byte.
const BYTE: Duration = Duration::from_millis(250);

/// How the server fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// It does not.
    #[default]
    None,
    /// Connections are closed as soon as they are made, and those there were are cut.
    Drop,
    /// Nothing is answered; watches fall silent. What waited is answered when the fault is over.
    Hang,
    /// Watches are accepted and not answered, not even with headers, nor later; all else is.
    NoHeaders,
    /// Watches begin and bring nothing, neither events nor bookmarks; lists are answered.
    Silent,
    /// A watch is answered with 200 and ends at once.
    Cut,
    /// Answers come byte by byte.
    Slow,
    /// Answers are pages for people, with a status of 200.
    Garbage,
    /// Lists end in the middle.
    Half,
    /// Lists have one empty page after the other.
    Endless,
    /// What is shown is some changes old, with the versions of that time.
    Stale,
    /// New requests are answered with `429` and are to come again after these seconds.
    Busy(u16),
    /// New requests are answered with this status; watches go on.
    Status(u16),
}

impl Fault {
    /// Those that have a name of their own, as command lines spell them.
    pub const NAMED: [(&'static str, Self); 11] = [
        ("drop", Self::Drop),
        ("hang", Self::Hang),
        ("no-headers", Self::NoHeaders),
        ("silent", Self::Silent),
        ("cut", Self::Cut),
        ("slow", Self::Slow),
        ("garbage", Self::Garbage),
        ("half", Self::Half),
        ("lie", Self::Stale),
        ("busy", Self::Busy(2)),
        ("error", Self::Status(500)),
    ];

    /// Whether a watch that runs tells nothing.
    #[must_use]
    pub fn silences(self) -> bool {
        matches!(self, Self::Hang | Self::Silent)
    }
}

impl FromStr for Fault {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        match Self::NAMED.iter().find(|(known, _)| *known == name) {
            Some((_, fault)) => Ok(*fault),
            None => {
                bail!("{name:?} is no fault of an API server: {:?} are", Self::NAMED.map(|(name, _)| name))
            }
        }
    }
}

/// The same body, byte by byte.
pub(super) fn slowly(body: Body) -> Body {
    let bytes = stream::unfold((body, Bytes::new()), |(mut body, mut left)| async move {
        while left.is_empty() {
            left = body.frame().await?.ok()?.into_data().unwrap_or_default();
        }
        tokio::time::sleep(BYTE).await;
        let byte = left.split_to(1);
        Some((Ok::<_, Infallible>(Frame::data(byte)), (body, left)))
    });
    StreamBody::new(bytes).boxed()
}

/// A page for people.
pub(super) fn page() -> Body {
    Full::new(Bytes::from_static(b"<html><body>Please log in</body></html>\n")).boxed()
}

/// The first half of what there is.
pub(super) fn half(text: &str) -> Body {
    let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
    StreamBody::new(stream::iter([Ok::<_, Infallible>(Frame::data(half))])).boxed()
}
