//! The real agent on the real kernel: what users would see.

#[cfg(test)]
mod basics;
#[cfg(test)]
mod common;
