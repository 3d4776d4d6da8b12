//! Whether a server lives of which nothing is heard.
//!
//! A watch may be silent because nothing happens or because its server hangs. Over HTTP/2 the connection's PING tells. HTTP/1
//! has none, so something small is asked for on another connection: whatever is answered, and be it a refusal, is an answer.

use std::time::Duration;

use tokio::time::sleep;

use super::backoff::between;
use super::connect::Way;

/// Silence after which it is asked. With the time for an answer it makes less than ten seconds. By chance, so that nodes that
/// have heard of the same change do not ask together.
const SILENCE: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(4)];

/// Looks after the server in use, for ever.
pub(super) async fn run(way: Way) {
    loop {
        let silence = between(SILENCE);
        loop {
            let left = way.servers().unheard().map_or(silence, |since| silence.saturating_sub(since));
            if left.is_zero() {
                break;
            }
            sleep(left).await;
        }
        way.probe().await;
    }
}
