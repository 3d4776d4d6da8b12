//! API servers that were learnt, from one agent to the next: a note beside the tables.

use agent_kernel::datapath::store::note::Note;
use agent_source::api::ServerCache;

/// The note that holds them.
pub(super) struct Learnt(pub(super) Note);

impl ServerCache for Learnt {
    fn load(&self) -> String {
        self.0.read().unwrap_or_else(|error| {
            tracing::warn!("API servers that an earlier agent has learnt cannot be read: {error}");
            String::new()
        })
    }

    fn save(&self, text: &str) {
        if let Err(error) = self.0.write(text) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "API servers that were learnt are not kept for the next agent"
            );
        }
    }
}
