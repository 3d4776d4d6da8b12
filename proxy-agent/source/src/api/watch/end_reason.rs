//! Why a watch, or the list before it, has ended.

use std::time::Duration;

use kube::core::Status;

use crate::api::connection::{BodyError, with_root_cause};

/// A watch that has lasted this long worked: its end has nothing to do with earlier failures.
pub(super) const PROVEN_AFTER: Duration = Duration::from_secs(10);
/// How long a server must show an older state before it is accepted: it was restored from a backup.
pub(super) const ROLLBACK_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) enum EndReason {
    /// No event came.
    Idle,
    /// No event came although the server's own cache is newer.
    Stalled,
    /// A failover, or other credentials.
    Reconnect,
    /// The server has closed it, after this time.
    Closed(Duration),
    /// The connection has broken, after this time.
    Broken(Duration, String),
    /// No server could be reached.
    Unreachable(String),
    /// The server has answered with this error.
    Status(Box<Status>),
    /// The answer cannot be decoded.
    Undecodable(String),
    /// It is too slow or too large.
    LimitExceeded(String),
    /// A list that ended half-way.
    Truncated,
    /// A streaming list without the bookmark that ends it.
    NotStreaming,
    /// An older state than the one that is known.
    Stale { known: u64 },
}

impl EndReason {
    pub(super) fn from_request(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status(status),
            kube::Error::Service(error) => Self::Unreachable(with_root_cause(&*error)),
            error if BodyError::is_cause_of(&error) => Self::LimitExceeded(with_root_cause(&error)),
            error => Self::Undecodable(with_root_cause(&error)),
        }
    }

    pub(super) fn from_stream(error: kube::Error, lasted: Duration) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status(status),
            kube::Error::SerdeError(_) => Self::Undecodable(with_root_cause(&error)),
            error if BodyError::is_cause_of(&error) => Self::LimitExceeded(with_root_cause(&error)),
            error => Self::Broken(lasted, with_root_cause(&error)),
        }
    }

    /// The reason in the metric.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Stalled => "stalled",
            Self::Reconnect => "reconnect",
            Self::Closed(lasted) if *lasted >= PROVEN_AFTER => "closed",
            Self::Closed(_) => "closed_early",
            Self::Broken(..) => "broken",
            Self::Unreachable(_) => "unreachable",
            Self::Status(_) => "status",
            Self::Undecodable(_) => "undecodable",
            Self::LimitExceeded(_) => "limit_exceeded",
            Self::Truncated => "truncated",
            Self::NotStreaming => "not_streaming",
            Self::Stale { .. } => "stale",
        }
    }
}

impl std::fmt::Display for EndReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Idle => f.write_str("no event came"),
            Self::Stalled => f.write_str("its watches are stalled: no events, although its lists are newer"),
            Self::Reconnect => f.write_str("reconnecting"),
            Self::Closed(_) => f.write_str("the watch closes as soon as it has started"),
            Self::Broken(_, why) => write!(f, "the watch breaks: {why}"),
            Self::Unreachable(why) | Self::LimitExceeded(why) => f.write_str(why),
            Self::Status(status) if status.message.is_empty() => {
                write!(f, "answered {} {}", status.code, status.reason)
            }
            Self::Status(status) => write!(f, "{}: {}", status.reason, status.message),
            Self::Undecodable(why) => write!(f, "the answer cannot be decoded: {why}"),
            Self::Truncated => f.write_str("the list ended half-way"),
            Self::NotStreaming => f.write_str("the list has no end bookmark"),
            Self::Stale { known } => {
                write!(
                    f,
                    "it shows an older state than the known resource version {known}: a replica that lags behind, or one \
                     restored from a backup, which is accepted after {ROLLBACK_AFTER:?}"
                )
            }
        }
    }
}
