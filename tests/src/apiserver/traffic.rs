//! What clients cost a server: connections and bytes, and when each request came.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::io::{InspectReader, InspectWriter};

use super::{ApiServer, Shared};

/// All connections so far; with TLS its records count, without the headers of TCP and IP.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// When each connection was made.
    pub connections: Vec<Instant>,
    /// Bytes from clients.
    pub received: u64,
    /// Bytes to clients.
    pub sent: u64,
}

/// Counts them.
#[derive(Default)]
pub(super) struct Meter {
    connections: Mutex<Vec<Instant>>,
    received: AtomicU64,
    sent: AtomicU64,
}

impl ApiServer {
    /// What has gone to clients and come from them.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let meter = &self.shared.meter;
        Traffic {
            connections: meter.connections.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            received: meter.received.load(Ordering::Relaxed),
            sent: meter.sent.load(Ordering::Relaxed),
        }
    }

    /// When each request came: as [`Self::requests`], in the same order.
    #[must_use]
    pub fn timed_requests(&self) -> Vec<(Instant, String)> {
        self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many watches run here.
    #[must_use]
    pub fn watches(&self) -> u64 {
        self.shared.watching.load(Ordering::Relaxed)
    }
}

/// A new connection, which is counted with all that passes.
pub(super) fn counted(
    stream: TcpStream,
    shared: &Arc<Shared>,
) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
    shared.meter.connections.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
    let count = |bytes: &[u8], to: &AtomicU64| {
        to.fetch_add(u64::try_from(bytes.len()).unwrap_or(0), Ordering::Relaxed);
    };
    let (reading, writing) = (shared.clone(), shared.clone());
    let stream = InspectReader::new(stream, move |bytes| count(bytes, &reading.meter.received));
    InspectWriter::new(stream, move |bytes| count(bytes, &writing.meter.sent))
}
