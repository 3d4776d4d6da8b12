//! API servers that were learnt, from one agent to the next: a note beside the tables.

use crate::datapath::note::Note;
use crate::source::kubernetes::Memory;

impl Memory for Note {
    fn recall(&self) -> String {
        self.read().unwrap_or_else(|error| {
            tracing::warn!("API servers that an earlier agent has learnt cannot be read: {error}");
            String::new()
        })
    }

    fn keep(&self, text: &str) {
        if let Err(error) = self.write(text) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "API servers that were learnt are not kept for the next agent"
            );
        }
    }
}
