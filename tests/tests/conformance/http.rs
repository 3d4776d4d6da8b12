//! One HTTP request from a place, as upstream's tests make it with curl.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use proxy_tests::pod::Place;

/// The whole response to a GET.
pub(crate) fn get(place: &Place, to: SocketAddr, path: &str) -> Result<String> {
    try_get(place, to, path)?.with_context(|| format!("{to} refuses {}", place.name))
}

/// The whole response to a GET; nothing when the connection is refused.
pub(crate) fn try_get(place: &Place, to: SocketAddr, path: &str) -> Result<Option<String>> {
    let ask = || -> std::io::Result<Option<String>> {
        let timeout = Duration::from_secs(3);
        let mut stream = match TcpStream::connect_timeout(&to, timeout) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(None),
            other => other?,
        };
        stream.set_read_timeout(Some(timeout))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(Some(response))
    };
    place.netns.run_in(ask)?.with_context(|| format!("GET http://{to}{path} from {}", place.name))
}
