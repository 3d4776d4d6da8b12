//! What lies on bpffs and outlives the agent: pins, typed tables, and notes that no program reads.

pub mod layout;
pub mod note;
pub mod pin;
pub mod retired;
pub mod table;
