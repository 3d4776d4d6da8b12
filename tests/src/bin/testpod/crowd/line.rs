//! One connection, or one connected UDP socket: a question at a time, and its answer.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::answer::Answer;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};

use crate::client::failure;

/// A way to ask that is open.
pub(super) enum Line {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

impl Line {
    /// Opens it.
    pub(super) async fn connect(to: SocketAddr, udp: bool, timeout: Duration) -> Result<Self, String> {
        if !udp {
            let stream = within("connect", timeout, TcpStream::connect(to)).await?;
            stream.set_nodelay(true).map_err(|error| failure("nodelay", &error))?;
            return Ok(Self::Tcp(BufReader::new(stream)));
        }
        let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
        let socket = UdpSocket::bind(any).await.map_err(|error| failure("bind", &error))?;
        within("connect", timeout, socket.connect(to)).await?;
        Ok(Self::Udp(socket))
    }

    /// Its own end.
    pub(super) fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.get_ref().local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
        .ok()
    }

    /// Asks, and tells who has answered just that.
    pub(super) async fn exchange(&mut self, number: u64, timeout: Duration) -> Result<String, String> {
        let text = match self {
            Self::Tcp(stream) => {
                within("send", timeout, stream.get_mut().write_all(b"hello\n")).await?;
                let mut line = String::new();
                if within("receive", timeout, stream.read_line(&mut line)).await? == 0 {
                    return Err("receive closed".into());
                }
                line.into_bytes()
            }
            Self::Udp(socket) => {
                let asked = number.to_be_bytes();
                within("send", timeout, socket.send(&asked)).await?;
                within("receive", timeout, answer_to(socket, &asked)).await?
            }
        };
        let answer: Answer = serde_json::from_slice(&text).map_err(|_| "receive garbage".to_owned())?;
        Ok(answer.name)
    }
}

/// The answer to this question; one to an earlier question comes late and was missed already.
async fn answer_to(socket: &UdpSocket, asked: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 2048];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // The server says who it is, and then what it was asked.
        if let Some(text) = buffer[..length].strip_suffix(asked) {
            return Ok(text.to_vec());
        }
    }
}

async fn within<T>(
    step: &str,
    timeout: Duration,
    work: impl Future<Output = std::io::Result<T>>,
) -> Result<T, String> {
    match tokio::time::timeout(timeout, work).await {
        Ok(outcome) => outcome.map_err(|error| failure(step, &error)),
        Err(_) => Err(format!("{step} timeout")),
    }
}
