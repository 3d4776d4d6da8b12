//! One conversation of which the test holds both ends, so that either may speak first.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::netns::Netns;
use socket2::{Domain, Socket, Type};

/// How long a word may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// What is said.
const WORD: &[u8] = b"a word";

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Tcp,
    Udp,
}

/// A TCP connection, or a connected UDP socket and the one that it has reached.
pub(crate) struct Talk {
    what: String,
    way: Way,
    client: Socket,
    server: Socket,
}

impl Talk {
    /// A client that asks `to`, from this port of its own unless it is 0, and a server that listens at `at`: the client
    /// has been received and has received the answer.
    pub(crate) fn begin(
        way: Way,
        (client, port): (&Netns, u16),
        to: SocketAddr,
        (server, at): (&Netns, SocketAddr),
    ) -> Result<Self> {
        let what =
            format!("{way:?} from port {port} in {} to {to}, for {at} in {}", client.name(), server.name());
        let (client, server) = match way {
            Way::Tcp => {
                let listener = server.run_in(|| socket(Type::STREAM, at))?.context("a listener")?;
                listener.listen(8).context("listening")?;
                let client = client.run_in(|| connected(Type::STREAM, to, port))?.context(what.clone())?;
                let (accepted, _) = listener.accept().with_context(|| format!("{what}: accepting"))?;
                (client, accepted)
            }
            Way::Udp => {
                let server = server.run_in(|| socket(Type::DGRAM, at))?.context("a server")?;
                let client = client.run_in(|| connected(Type::DGRAM, to, port))?.context(what.clone())?;
                client.send(WORD).with_context(|| format!("{what}: sending"))?;
                let (_, peer) = server
                    .recv_from(&mut [std::mem::MaybeUninit::uninit(); 64])
                    .with_context(|| format!("{what}: nothing arrives"))?;
                server.connect(&peer).context("connecting the server")?;
                (client, server)
            }
        };
        for socket in [&client, &server] {
            socket.set_read_timeout(Some(PATIENCE)).context("setting a time-out")?;
        }
        let talk = Self { what, way, client, server };
        talk.push()?;
        Ok(talk)
    }

    /// Whether it is a TCP connection.
    pub(crate) fn is_tcp(&self) -> bool {
        self.way == Way::Tcp
    }

    /// The client speaks.
    pub(crate) fn ask(&self) -> Result<()> {
        say(&self.client, &self.server).with_context(|| format!("{}: the client speaks", self.what))
    }

    /// The server speaks, whether it was asked or not.
    pub(crate) fn push(&self) -> Result<()> {
        say(&self.server, &self.client).with_context(|| format!("{}: the server speaks", self.what))
    }

    /// Question and answer.
    pub(crate) fn exchange(&self) -> Result<()> {
        self.ask()?;
        self.push()
    }
}

fn say(mut from: &Socket, mut to: &Socket) -> Result<()> {
    from.write_all(WORD).context("sending")?;
    let mut received = [0; WORD.len()];
    to.read_exact(&mut received).context("receiving")?;
    ensure!(received == WORD, "received {received:?}");
    Ok(())
}

fn socket(kind: Type, at: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), kind, None)?;
    socket.set_reuse_address(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // The listener of a moment ago may still be there in a process that is just being started.
    let begun = Instant::now();
    while let Err(error) = socket.bind(&at.into()) {
        if error.kind() != ErrorKind::AddrInUse || begun.elapsed() > PATIENCE {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(socket)
}

fn connected(kind: Type, to: SocketAddr, port: u16) -> std::io::Result<Socket> {
    let any = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0; 16].into() };
    let socket = socket(kind, SocketAddr::new(any, port))?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket)
}
