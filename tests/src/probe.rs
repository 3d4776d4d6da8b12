//! The test-pod program in a place: servers that answer with their name, clients that count answers.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::de::DeserializeOwned;

use crate::answer::{Answer, Hold, Load, Request, Transfer};
use crate::pod::Place;

/// How long one line of the test-pod program may take beyond what it was asked to do.
const PATIENCE: Duration = Duration::from_secs(15);

/// The longest pause between two tries.
const PAUSE: Duration = Duration::from_millis(50);
/// The same where each try is a command of the agent's: half a hundred of them would cost as much as its start.
const COMMAND_PAUSE: Duration = Duration::from_millis(200);

/// Tries until it succeeds or time is up, with short waits: the only way to wait here. The time is multiplied by
/// [`patience`](crate::patience).
///
/// # Errors
/// The last error, with how long and how often it was tried.
pub fn eventually<T>(timeout: Duration, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    try_until(timeout, PAUSE, attempt)
}

/// Waits for what shows by nothing that could be asked for: that something does *not* happen, or that a time has passed.
/// `what` is printed where the test fails.
pub fn wait(time: Duration, what: &str) {
    crate::say(&format!("waits {time:?}: {what}"));
    std::thread::sleep(time);
}

/// [`eventually`] with longer pauses, for what asks the agent by a command.
///
/// # Errors
/// As those of [`eventually`].
pub fn eventually_by_command<T>(timeout: Duration, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    try_until(timeout, COMMAND_PAUSE, attempt)
}

fn try_until<T>(timeout: Duration, longest: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let (begun, timeout) = (Instant::now(), timeout * crate::patience());
    let mut pause = longest / 50;
    for tries in 1.. {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if begun.elapsed() >= timeout => {
                return Err(error.context(format!("still so after {timeout:?} and {tries} tries")));
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(longest);
    }
    unreachable!("the tries do not run out")
}

/// What a client asks and how: the flags of the test-pod program.
#[derive(Clone, Debug)]
pub struct Ask {
    to: SocketAddr,
    arguments: Vec<String>,
}

impl Ask {
    /// Asks with TCP.
    #[must_use]
    pub fn tcp(to: SocketAddr) -> Self {
        Self { to, arguments: vec!["--to".into(), to.to_string()] }
    }

    /// Asks with a connected UDP socket.
    #[must_use]
    pub fn udp(to: SocketAddr) -> Self {
        Self::tcp(to).with("--udp", None)
    }

    /// Asks with a UDP socket that is not connected.
    #[must_use]
    pub fn unconnected(to: SocketAddr) -> Self {
        Self::udp(to).with("--unconnected", None)
    }

    /// From this own port.
    #[must_use]
    pub fn from_port(self, port: u16) -> Self {
        let any = if self.to.is_ipv4() { "0.0.0.0" } else { "[::]" };
        let from = format!("{any}:{port}");
        self.with("--from", Some(from))
    }

    /// From this own address and port.
    #[must_use]
    pub fn from(self, address: SocketAddr) -> Self {
        self.with("--from", Some(address.to_string()))
    }

    /// With requests of this many bytes.
    #[must_use]
    pub fn payload(self, bytes: usize) -> Self {
        self.with("--payload", Some(bytes.to_string()))
    }

    /// Gives up on connecting, and on an answer, after this time.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with("--timeout-ms", Some(timeout.as_millis().to_string()))
    }

    fn with(mut self, flag: &str, value: Option<String>) -> Self {
        self.arguments.push(flag.into());
        self.arguments.extend(value);
        self
    }

    fn and(&self, more: &[(&str, String)]) -> Vec<String> {
        let more = more.iter().flat_map(|(flag, value)| [(*flag).to_owned(), value.clone()]);
        self.arguments.iter().cloned().chain(more).collect()
    }
}

/// A running test-pod program. Dropping it ends it.
#[derive(Debug)]
pub struct Process {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Process {
    /// Starts the test-pod program in a place.
    pub fn start(place: &Place, verb: &str, arguments: &[String]) -> Result<Self> {
        let what = format!("testpod {verb} {} in {}", arguments.join(" "), place.name);
        let mut command = Command::new(crate::require::testpod_binary()?);
        command.arg(verb).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = place.spawn(command)?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("stdout of the test-pod program")?;
        Ok(Self { what, child, stdin, lines: read_lines(stdout) })
    }

    /// The next line it prints.
    pub fn line<T: DeserializeOwned + Debug>(&mut self, patience: Duration) -> Result<T> {
        let line = self.lines.recv_timeout(patience * crate::patience()).map_err(|error| {
            let status = self.child.try_wait();
            anyhow!("{} printed nothing ({error}); its state: {status:?}", self.what)
        })?;
        serde_json::from_str(&line).with_context(|| format!("{} printed: {line}", self.what))
    }

    /// The next line, if it has printed one.
    pub fn printed<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let Ok(line) = self.lines.try_recv() else { return Ok(None) };
        serde_json::from_str(&line).map(Some).with_context(|| format!("{} printed: {line}", self.what))
    }

    /// Gives it an order.
    pub fn order(&mut self, order: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("{} takes no orders", self.what))?;
        writeln!(stdin, "{order}").with_context(|| format!("telling {} to {order}", self.what))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Asks over HTTP from a place: code and body.
pub fn http(place: &Place, to: SocketAddr, path: &str) -> Result<(u16, String)> {
    let ask = || -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = place.netns.run_in(ask)?.with_context(|| format!("GET http://{to}{path}"))?;
    let code = text.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    code.zip(body).with_context(|| format!("http://{to}{path} answered: {text}"))
}

fn read_lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A server in a place.
#[derive(Debug)]
pub struct Server(Process);

impl Server {
    /// Serves TCP and UDP on these ports under the place's name, and waits until it listens.
    pub fn start(place: &Place, ports: &[u16]) -> Result<Self> {
        Self::named(place, &place.name, ports)
    }

    /// The same under another name.
    pub fn named(place: &Place, name: &str, ports: &[u16]) -> Result<Self> {
        let mut arguments = vec!["--name".into(), name.into()];
        if place.host_interface.is_none() {
            // A node has more addresses than one: a UDP socket bound to none of them answers from any.
            arguments.extend(place.addresses().iter().flat_map(|own| ["--bind".into(), own.to_string()]));
        }
        for port in ports {
            arguments.extend(["--tcp".into(), port.to_string(), "--udp".into(), port.to_string()]);
        }
        let mut process = Process::start(place, "serve", &arguments)?;
        process.line::<serde_json::Value>(PATIENCE)?;
        Ok(Self(process))
    }

    /// Stops accepting; open connections live on, as in a pod that ends gracefully.
    pub fn drain(&mut self) -> Result<()> {
        self.0.order("drain")?;
        self.0.line::<serde_json::Value>(PATIENCE).map(drop)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }
}

/// Makes one request from a place; a failure of the network is a value in it.
pub fn request(place: &Place, ask: &Ask) -> Result<Request> {
    Process::start(place, "get", &ask.arguments)?.line(PATIENCE)
}

/// Makes one request and wants an answer.
pub fn get(place: &Place, ask: &Ask) -> Result<Answer> {
    wanted(place, ask, request(place, ask)?)
}

fn wanted(place: &Place, ask: &Ask, request: Request) -> Result<Answer> {
    request.answer.with_context(|| {
        let failure = request.failure.unwrap_or_default();
        format!("{} asks {}: {failure}", place.name, ask.to)
    })
}

/// Makes this many requests one after the other from one process, each with a socket of its own.
pub fn requests(place: &Place, ask: &Ask, times: u32) -> Result<Vec<Request>> {
    let mut process = Process::start(place, "get", &ask.and(&[("--times", times.to_string())]))?;
    (0..times).map(|_| process.line(PATIENCE)).collect()
}

/// Makes this many requests one after the other and counts who answered; wants an answer to each.
pub fn tally(place: &Place, ask: &Ask, times: u32) -> Result<BTreeMap<String, u32>> {
    let mut names = BTreeMap::new();
    for request in requests(place, ask, times)? {
        *names.entry(wanted(place, ask, request)?.name).or_default() += 1;
    }
    Ok(names)
}

/// Sends this many bytes over one TCP connection while the server sends them back; wants all of them.
pub fn transfer(place: &Place, ask: &Ask, bytes: u64) -> Result<()> {
    let mut process = Process::start(place, "transfer", &ask.and(&[("--bytes", bytes.to_string())]))?;
    let transfer: Transfer = process.line(PATIENCE)?;
    let whole = transfer.failure.is_none() && transfer.echoed == bytes;
    ensure!(whole, "{} sends {bytes} bytes to {}: {transfer:?}", place.name, ask.to);
    Ok(())
}

/// Asks all of these twice in turn over one UDP socket that is not connected.
pub fn roam(place: &Place, targets: &[SocketAddr]) -> Result<Vec<Request>> {
    let arguments: Vec<String> =
        targets.iter().flat_map(|target| ["--to".to_owned(), target.to_string()]).collect();
    let mut process = Process::start(place, "roam", &arguments)?;
    (0..targets.len() * 2).map(|_| process.line(PATIENCE)).collect()
}

/// A socket in a place that does what it is told.
#[derive(Debug)]
pub struct Remote(Process);

impl Remote {
    /// A socket of this family (`inet`, `inet6`) and kind (`udp`, `tcp`, `mptcp`). A second that an answer may take, and the
    /// minute that it lives at most, are multiplied by [`patience`](crate::patience).
    pub fn open(place: &Place, family: &str, kind: &str) -> Result<Self> {
        let (answer, life) = (1000 * crate::patience(), 60 * crate::patience());
        let (answer, life) = (answer.to_string(), life.to_string());
        let arguments = ["--family", family, "--kind", kind, "--timeout-ms", &answer, "--seconds", &life]
            .map(ToOwned::to_owned);
        Process::start(place, "socket", &arguments).map(Self)
    }

    /// One step, with an address or an empty word; a failure of the network is a value in what comes back. Addresses
    /// in that are never mapped ones.
    pub fn step(&mut self, verb: &str, address: &str) -> Result<Request> {
        self.0.order(format!("{verb} {address}").trim())?;
        self.0.line(PATIENCE)
    }

    /// One step that must not fail.
    pub fn done(&mut self, verb: &str, address: &str) -> Result<Request> {
        let request = self.step(verb, address)?;
        ensure!(request.failure.is_none(), "{} {verb} {address}: {request:?}", self.0.what);
        Ok(request)
    }
}

/// A client that runs beside the test: `T` is what it reports.
#[derive(Debug)]
pub struct Runner<T> {
    process: Process,
    report: std::marker::PhantomData<T>,
}

impl Runner<Load> {
    /// A steady load of new connections for at most `limit`, times [`patience`](crate::patience).
    pub fn load(place: &Place, ask: &Ask, rate: u32, concurrency: u32, limit: Duration) -> Result<Self> {
        let more = [
            ("--rate", rate.to_string()),
            ("--concurrency", concurrency.to_string()),
            ("--seconds", (limit * crate::patience()).as_secs_f64().to_string()),
        ];
        Self::start(place, "load", &ask.and(&more))
    }
}

impl Runner<Hold> {
    /// One socket with an exchange at every interval for at most `limit`, times [`patience`](crate::patience).
    pub fn hold(place: &Place, ask: &Ask, interval: Duration, limit: Duration) -> Result<Self> {
        let more = [
            ("--interval-ms", interval.as_millis().to_string()),
            ("--seconds", (limit * crate::patience()).as_secs_f64().to_string()),
        ];
        Self::start(place, "hold", &ask.and(&more))
    }
}

impl<T: DeserializeOwned + Debug> Runner<T> {
    fn start(place: &Place, verb: &str, arguments: &[String]) -> Result<Self> {
        Ok(Self { process: Process::start(place, verb, arguments)?, report: std::marker::PhantomData })
    }

    /// What it has counted so far.
    pub fn report(&mut self) -> Result<T> {
        self.process.order("report")?;
        self.process.line(PATIENCE)
    }

    /// Stops it; the end result.
    pub fn stop(mut self) -> Result<T> {
        self.process.order("stop")?;
        self.process.line(PATIENCE)
    }
}
