//! Servers: TCP by lines (and just enough HTTP for curl), UDP by datagrams.
//!
//! After the line `ECHO` a TCP connection gives back every byte it is sent.
//! A UDP answer is the JSON line followed by the datagram itself, so large requests are answered large.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use proxy_tests::answer::Answer;

use crate::stdin::{Order, Orders};

/// Bytes of datagrams that may wait.
const QUEUE: usize = 8 << 20;
/// A line longer than this is not a test's.
const LONGEST_LINE: u64 = 1 << 20;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Port to serve with TCP; may be given more than once.
    #[arg(long)]
    tcp: Vec<u16>,
    /// Port to serve with UDP; may be given more than once.
    #[arg(long)]
    udp: Vec<u16>,
    /// Name to answer with.
    #[arg(long, default_value = "testpod")]
    name: String,
    /// Address to listen on; both families by default. May be given more than once.
    #[arg(long, default_value = "::")]
    bind: Vec<IpAddr>,
    /// Ends by itself after this time.
    #[arg(long, default_value_t = 86_400.0)]
    seconds: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let name: Arc<str> = arguments.name.as_str().into();
    let draining = Arc::new(AtomicBool::new(false));
    for address in at(&arguments.bind, &arguments.tcp) {
        let listener = TcpListener::bind(address).with_context(|| format!("listening on tcp {address}"))?;
        let (name, draining) = (name.clone(), draining.clone());
        std::thread::spawn(move || accept(&listener, &name, &draining));
    }
    for address in at(&arguments.bind, &arguments.udp) {
        let socket = UdpSocket::bind(address).with_context(|| format!("listening on udp {address}"))?;
        // What waits while this process has to wait for a processor is not lost. Only root may; others get what is usual.
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &QUEUE).ok();
        let name = name.clone();
        std::thread::spawn(move || answer_datagrams(&socket, &name));
    }
    crate::print(&serde_json::json!({ "serving": arguments.name }))?;
    let orders = Orders::listen(arguments.seconds);
    loop {
        match orders.within(Duration::from_secs(3600)) {
            Some(Order::Stop) => return Ok(()),
            Some(Order::Drain) => {
                draining.store(true, Ordering::Relaxed);
                wake(arguments);
                crate::print(&serde_json::json!({ "draining": arguments.name }))?;
            }
            Some(Order::Report) | None => {}
        }
    }
}

/// Every address with every port.
fn at<'a>(addresses: &'a [IpAddr], ports: &'a [u16]) -> impl Iterator<Item = SocketAddr> + 'a {
    addresses.iter().flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port)))
}

/// Lets the threads that wait for something new see that nothing new is wanted.
fn wake(arguments: &Arguments) {
    for mut address in at(&arguments.bind, &arguments.tcp) {
        if address.ip().is_unspecified() {
            address.set_ip([127, 0, 0, 1].into());
        }
        // Until the listener is gone: that connections are refused now is what draining promises.
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok() {}
    }
}

fn accept(listener: &TcpListener, name: &Arc<str>, draining: &AtomicBool) {
    for stream in listener.incoming().flatten() {
        if draining.load(Ordering::Relaxed) {
            return;
        }
        let name = name.clone();
        // A connection that breaks is the client's to report.
        std::thread::spawn(move || answer_lines(&stream, &name).ok());
    }
}

fn answer_lines(stream: &TcpStream, name: &str) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let (peer, local) = (canonical(stream.peer_addr()?), canonical(stream.local_addr()?));
    let mut line = String::new();
    while reader.by_ref().take(LONGEST_LINE).read_line(&mut line)? > 0 {
        let request = line.trim_end_matches(['\r', '\n']);
        if request == "ECHO" {
            std::io::copy(&mut reader, &mut writer)?;
            return Ok(writer.shutdown(Shutdown::Write)?);
        }
        let answer = Answer { name: name.into(), peer, local, length: request.len() };
        let mut text = serde_json::to_string(&answer)?;
        text.push('\n');
        if request.starts_with("GET ") {
            return answer_http(&mut reader, &mut writer, &text);
        }
        writer.write_all(text.as_bytes())?;
        line.clear();
    }
    Ok(())
}

/// Reads the head to its end, so that closing sends no reset, and answers once.
fn answer_http(reader: &mut impl BufRead, writer: &mut impl Write, text: &str) -> Result<()> {
    for line in reader.lines() {
        if line?.trim().is_empty() {
            break;
        }
    }
    let length = text.len();
    write!(
        writer,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{text}"
    )?;
    Ok(())
}

/// Goes on while TCP drains: without connections there is nothing that could be kept open instead.
fn answer_datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = vec![0; 65536];
    loop {
        // An error here is an ICMP message about an earlier answer: that client is gone, others are not.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let Ok(local) = socket.local_addr() else { continue };
        let answer = Answer { name: name.into(), peer: canonical(from), local: canonical(local), length };
        let Ok(mut text) = serde_json::to_vec(&answer) else { continue };
        text.push(b'\n');
        // The header must not push a large answer over what a datagram can hold.
        let room = 65_507 - text.len();
        text.extend_from_slice(&buffer[..length.min(room)]);
        socket.send_to(&text, from).ok();
    }
}

/// A dual-stack socket shows IPv4 peers as mapped addresses; the answer names what was on the wire.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
