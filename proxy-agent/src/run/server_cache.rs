//! API servers that were discovered, kept from one agent to the next in a note beside the tables.

use agent_kernel::datapath::store::note::Note;
use agent_source::api::ServerCache;

/// The note that holds them.
pub(super) struct CachedServers(pub(super) Note);

impl ServerCache for CachedServers {
    fn load(&self) -> String {
        self.0.read().unwrap_or_else(|error| {
            tracing::warn!("API servers that an earlier agent has discovered cannot be read: {error}");
            String::new()
        })
    }

    fn save(&self, text: &str) {
        if let Err(error) = self.0.write(text) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "API servers that were discovered are not kept for the next agent"
            );
        }
    }
}
