//! See and write: the only room that talks to BPF. Its rooms, each of which knows those before it:
//!
//! `store` is what lies on bpffs: pins, typed tables, notes. `probe` asks the kernel what it can do. `flow` is what the
//! programs keep, `tables` are those that the agent writes. `attach` puts programs on hooks and keeps them there; `load` makes
//! tables and programs, and leads from one generation to the next. `pinned` is all of it for who only looks.

pub mod attach;
pub mod flow;
pub mod load;
pub mod pinned;
pub mod probe;
pub mod store;
pub mod tables;
