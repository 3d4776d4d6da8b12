//! Why a watch, or the list before it, has come to its end.

use std::time::Duration;

use kube::core::Status;

use super::body::Unfit;
use super::connect::cause;
use super::follow::Progress;

/// A watch that has lived so long works: what happens to it then has nothing to do with what was before.
pub(super) const LIVED: Duration = Duration::from_secs(10);
/// How long a server must insist on a past that we have left behind, before it is believed: it was restored.
pub(super) const INSISTS: Duration = Duration::from_secs(60);

/// Why.
#[derive(Debug)]
pub(super) enum End {
    /// Nothing was heard.
    Silent,
    /// Nothing was heard although the server knows more than it has told.
    Withheld,
    /// There is another server, or another account.
    Moved,
    /// The server has ended it, after this time.
    Over(Duration),
    /// The connection has broken, after this time.
    Broken(Duration, String),
    /// No server could be asked.
    Unreachable(String),
    /// The server has answered this.
    Status(Box<Status>),
    /// It cannot be understood.
    Unreadable(String),
    /// It comes too slowly, or without end.
    Unfit(String),
    /// A list that just ended.
    Half,
    /// A streaming list that never ends.
    Endless,
    /// An older state than the one that is known.
    Backwards { known: u64 },
}

impl End {
    /// Why a request was not answered as it should have been.
    pub(super) fn of_request(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status(status),
            kube::Error::Service(error) => Self::Unreachable(cause(&*error)),
            error if Unfit::is_behind(&error) => Self::Unfit(cause(&error)),
            error => Self::Unreadable(cause(&error)),
        }
    }

    /// Why a watch did not go on.
    pub(super) fn of_stream(error: kube::Error, lived: Duration) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status(status),
            kube::Error::SerdeError(_) => Self::Unreadable(cause(&error)),
            error if Unfit::is_behind(&error) => Self::Unfit(cause(&error)),
            error => Self::Broken(lived, cause(&error)),
        }
    }

    /// Why a watch is begun anew of which nothing was heard, at least not lately.
    pub(super) fn silent(progress: &mut Progress) -> Self {
        if progress.silence.lasted(progress.generation) { Self::Withheld } else { Self::Silent }
    }

    /// In one word, for metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Withheld => "withheld",
            Self::Moved => "moved",
            Self::Over(lived) if *lived >= LIVED => "over",
            Self::Over(_) => "cut",
            Self::Broken(..) => "broken",
            Self::Unreachable(_) => "unreachable",
            Self::Status(_) => "status",
            Self::Unreadable(_) => "unreadable",
            Self::Unfit(_) => "unfit",
            Self::Half => "half",
            Self::Endless => "endless",
            Self::Backwards { .. } => "backwards",
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent => f.write_str("nothing was heard"),
            Self::Withheld => {
                f.write_str("it withholds what it knows: its watches say nothing, its lists are newer")
            }
            Self::Moved => f.write_str("there is another server, or another account"),
            Self::Over(_) => f.write_str("the watch ends as soon as it has begun"),
            Self::Broken(_, why) => write!(f, "the watch breaks: {why}"),
            Self::Unreachable(why) | Self::Unfit(why) => f.write_str(why),
            Self::Status(status) if status.message.is_empty() => {
                write!(f, "answered {} {}", status.code, status.reason)
            }
            Self::Status(status) => write!(f, "{}: {}", status.reason, status.message),
            Self::Unreadable(why) => write!(f, "the answer cannot be understood: {why}"),
            Self::Half => f.write_str("the list ended half-way"),
            Self::Endless => f.write_str("the list does not end"),
            Self::Backwards { known } => {
                write!(
                    f,
                    "it shows an older state than version {known}, which was seen already: a copy that lags \
                           behind, or restored from a backup, which is believed after {INSISTS:?}"
                )
            }
        }
    }
}
