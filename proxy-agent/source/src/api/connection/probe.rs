//! Liveness probes for an idle server.
//!
//! A watch may be idle because nothing happens or because its server hangs. Over HTTP/2 the connection's PINGs show that.
//! HTTP/1 has none, so `/livez` is requested on another connection: any answer counts, even a rejection.

use std::time::Duration;

use tokio::time::sleep;

use super::transport::Transport;
use crate::api::backoff::between;

/// Idle time before a probe. With the probe's time-out it is less than ten seconds. Random, so that nodes that have received
/// the same change do not probe together.
const IDLE: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(4)];

/// Probes the server in use, for ever.
pub(in crate::api) async fn run(transport: Transport) {
    loop {
        let idle = between(IDLE);
        loop {
            let left = transport.servers().idle_for().map_or(idle, |since| idle.saturating_sub(since));
            if left.is_zero() {
                break;
            }
            sleep(left).await;
        }
        transport.probe().await;
    }
}
