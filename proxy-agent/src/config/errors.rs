//! Settings that cannot be followed: all of them at once, each by its name, its value and the reason (F-4).

use std::fmt;

use super::kube_proxy::fields::Origin;

/// One setting that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag} {value:?}: {reason}")]
pub struct FlagError {
    /// The flag, or the field of the file.
    pub flag: &'static str,
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Every setting that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<FlagError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of the settings cannot be followed:", self.0.len())?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// Collects what is wrong.
#[derive(Default)]
pub(super) struct Errors {
    pub(super) origin: Origin,
    pub(super) errors: Vec<FlagError>,
}

impl Errors {
    /// `flag` may be one of kube-proxy's: in a file it has another name.
    pub(super) fn add(&mut self, flag: &'static str, value: impl Into<String>, reason: impl Into<String>) {
        let flag = self.origin.name(flag);
        self.errors.push(FlagError { flag, value: value.into(), reason: reason.into() });
    }
}
