//! `/configz`: kube-proxy's settings as they are used (H-27).

use axum::routing::any;
use axum::{Json, Router};
use serde_json::Value;

/// A server of this configuration.
pub fn router(configuration: Value) -> Router {
    Router::new().route("/configz", any(async move || Json(configuration)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_configuration_is_shown_as_json() {
        // H-27.
        let page =
            super::super::ask(router(serde_json::json!({"a": {"kind": "b"}})), "GET", "/configz").await;
        assert!(page.starts_with("HTTP/1.1 200 OK") && page.contains("application/json"), "{page}");
        assert!(page.ends_with("\r\n\r\n{\"a\":{\"kind\":\"b\"}}"), "{page}");
    }
}
