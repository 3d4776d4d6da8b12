//! One socket towards a server: what `get`, `load` and `hold` share.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;
use proxy_tests::answer::Answer;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Whom to ask and how.
#[derive(Clone, clap::Args)]
pub(crate) struct Target {
    /// Address of the server or the Service.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// Own address and port; chosen by the kernel by default.
    #[arg(long)]
    pub(crate) from: Option<SocketAddr>,
    /// Use UDP.
    #[arg(long)]
    pub(crate) udp: bool,
    /// Use UDP without connecting the socket.
    #[arg(long, requires = "udp")]
    pub(crate) unconnected: bool,
    /// Bytes of a request.
    #[arg(long, default_value_t = 8)]
    pub(crate) payload: usize,
    /// How long connecting may take, and how long an answer.
    #[arg(long, default_value_t = 2000)]
    pub(crate) timeout_ms: u64,
}

impl Target {
    /// A UDP socket that is not connected.
    pub(crate) fn unconnected(to: SocketAddr, timeout_ms: u64) -> Self {
        Self { to, from: None, udp: true, unconnected: true, payload: 8, timeout_ms }
    }
}

/// A step that failed and the error's name: `connect ECONNREFUSED`.
pub(crate) type Failure = String;

/// An open socket.
pub(crate) struct Client {
    target: Target,
    socket: Socket,
    rest: Vec<u8>,
}

impl Client {
    /// Opens the socket; connects it unless asked not to.
    pub(crate) fn open(target: &Target) -> Result<Self, Failure> {
        let timeout = Duration::from_millis(target.timeout_ms);
        let (kind, protocol) =
            if target.udp { (Type::DGRAM, Protocol::UDP) } else { (Type::STREAM, Protocol::TCP) };
        let socket = Socket::new(Domain::for_address(target.to), kind, Some(protocol))
            .map_err(|e| failure("socket", &e))?;
        if let Some(from) = target.from {
            socket.set_reuse_address(true).map_err(|e| failure("reuse", &e))?;
            socket.bind(&from.into()).map_err(|e| failure("bind", &e))?;
        }
        socket.set_read_timeout(Some(timeout)).map_err(|e| failure("timeout", &e))?;
        socket.set_write_timeout(Some(timeout)).map_err(|e| failure("timeout", &e))?;
        if !target.udp {
            socket.set_tcp_nodelay(true).map_err(|e| failure("nodelay", &e))?;
        }
        if !target.unconnected {
            socket.connect_timeout(&target.to.into(), timeout).map_err(|e| failure("connect", &e))?;
        }
        Ok(Self { target: target.clone(), socket, rest: Vec::new() })
    }

    /// Sends one request and reads its answer, and where a datagram's answer came from.
    pub(crate) fn exchange(&mut self) -> Result<(Answer, Option<SocketAddr>), Failure> {
        if self.target.udp {
            self.exchange_datagram()
        } else {
            self.exchange_line().map(|answer| (answer, None))
        }
    }

    /// Asks somebody else from now on; for a socket that is not connected.
    pub(crate) fn turn_to(&mut self, to: SocketAddr) {
        self.target.to = to;
    }

    /// The bare socket.
    pub(crate) fn into_socket(self) -> Socket {
        self.socket
    }

    /// What `getpeername` says; nothing for an unconnected socket.
    pub(crate) fn peer_name(&self) -> Option<SocketAddr> {
        self.socket.peer_addr().ok().and_then(|address| address.as_socket())
    }

    /// The socket's own address.
    pub(crate) fn local(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok().and_then(|address| address.as_socket())
    }

    fn exchange_line(&mut self) -> Result<Answer, Failure> {
        let mut line = vec![b'x'; self.target.payload];
        line.push(b'\n');
        (&self.socket).write_all(&line).map_err(|e| failure("send", &e))?;
        let mut buffer = [0; 4096];
        let end = loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                break end;
            }
            match (&self.socket).read(&mut buffer) {
                Ok(0) => return Err("receive closed".into()),
                Ok(length) => self.rest.extend_from_slice(&buffer[..length]),
                Err(error) => return Err(failure("receive", &error)),
            }
        };
        let line: Vec<u8> = self.rest.drain(..=end).collect();
        serde_json::from_slice(&line).map_err(|_| "receive garbage".into())
    }

    fn exchange_datagram(&mut self) -> Result<(Answer, Option<SocketAddr>), Failure> {
        let payload = vec![b'x'; self.target.payload];
        let sent = if self.target.unconnected {
            self.socket.send_to(&payload, &SockAddr::from(self.target.to))
        } else {
            self.socket.send(&payload)
        };
        sent.map_err(|e| failure("send", &e))?;
        let mut buffer = vec![0; 65536];
        // `recv_from` of std sees initialised memory; socket2 offers it through `Read` only without the address.
        let socket: std::net::UdpSocket = self.socket.try_clone().map_err(|e| failure("dup", &e))?.into();
        let (length, from) = socket.recv_from(&mut buffer).map_err(|e| failure("receive", &e))?;
        let datagram = &buffer[..length];
        let end = datagram.iter().position(|byte| *byte == b'\n').ok_or("receive garbage")?;
        let answer: Answer = serde_json::from_slice(&datagram[..end]).map_err(|_| "receive garbage")?;
        let echoed = &datagram[end + 1..];
        if echoed.len() != payload.len().min(65_507 - end - 1) || echoed.iter().any(|byte| *byte != b'x') {
            return Err("receive damaged".into());
        }
        Ok((answer, Some(from)))
    }
}

/// The step and the error's name.
pub(crate) fn failure(step: &str, error: &std::io::Error) -> Failure {
    match (error.kind(), error.raw_os_error()) {
        (std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut, _) => format!("{step} timeout"),
        (_, Some(number)) => format!("{step} {:?}", Errno::from_raw(number)),
        (kind, None) => format!("{step} {kind:?}"),
    }
}
