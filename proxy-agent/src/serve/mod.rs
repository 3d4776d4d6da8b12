//! Tell: health and metrics over HTTP.

pub mod configz;
mod exposition;
pub mod health;
pub mod http;
pub mod metrics;
#[cfg(test)]
mod metrics_page_tests;
mod page;
mod pages;
mod probes;
pub mod process;
mod repairs;
pub mod service_health;
mod snapshot;
pub mod syncs;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;

pub use health::Health;
pub use http::{Connections, Limits};
pub use metrics::Metrics;
pub use probes::ProbeCounts;
pub use service_health::ServiceHealth;
pub use snapshot::Snapshot;

/// How long to wait before an address is tried again (H-12, H-28).
const BIND_EVERY: Duration = Duration::from_secs(5);

/// Serves `router` at `address` until this future is dropped, to `connections`; `what` names it in the log.
///
/// An address that cannot be had is tried for ever: the data plane does not depend on anyone hearing of it. Only
/// when a `hard` failure is asked for it is an error.
pub async fn serve(
    what: &str,
    address: SocketAddr,
    hard: bool,
    router: Router,
    connections: &Connections,
) -> io::Result<()> {
    let listener = match hard {
        true => TcpListener::bind(address).await?,
        false => bind(what, address, BIND_EVERY).await,
    };
    tracing::info!("serving {what} at {address}");
    connections.serve(what, listener, router).await;
    Ok(())
}

/// A listener at `address`, however long it takes.
async fn bind(what: &str, address: SocketAddr, every: Duration) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(e) => {
                tracing::warn!(
                    "cannot serve {what} at {address}: {e}; trying again in {every:?}, is another proxy \
                     running here?"
                );
                tokio::time::sleep(every).await;
            }
        }
    }
}

/// A whole response of a server made of `router`, for tests.
#[cfg(test)]
async fn ask(router: Router, method: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Connections::new(Limits::of(1024));
    let server = tokio::spawn(async move { connections.serve("test", listener, router).await });
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    server.abort();
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_taken_is_an_error_for_who_wants_it_so() {
        // H-12, H-28.
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = serve("health", address, true, Router::new(), &Connections::new(Limits::of(64)))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_tried_until_it_is_free() {
        // H-12, H-28.
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let waiting = tokio::spawn(bind("health", address, Duration::from_millis(5)));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let hard = serve("health", address, true, Router::new(), &Connections::new(Limits::of(64)))
            .await
            .unwrap_err();
        assert_eq!(hard.kind(), io::ErrorKind::AddrInUse);
        drop(taken);
        let listener = waiting.await.unwrap();
        assert_eq!(listener.local_addr().unwrap(), address);
    }
}
