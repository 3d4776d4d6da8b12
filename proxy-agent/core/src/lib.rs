//! The pure part of the node agent: what is reported becomes what we know, and that the writes that are due.
//!
//! `model` knows the world and says what should be in the tables; `plan` compares that with what is there, and lists the
//! writes; `datapath` is the trait of whoever does them; `capacity`
//! lists the sizes of tables. Nothing here talks to a kernel or a cluster, or asks for the time.

#![warn(clippy::cast_possible_truncation)] // Sizes and ports come from outside.

pub mod capacity;
pub mod datapath;
mod few;
pub mod model;
pub mod plan;
