//! What upstream's helpers call reachable, up, down, sticky and refused.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::answer::{Answer, Load};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, eventually, get, request, requests, tally};

/// How soon a change must show; upstream gives 30 seconds (`KubeProxyEndpointLagTimeout`).
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// How long a client waits for an answer that is not to come.
const SHORT: Duration = Duration::from_millis(300);
/// How long a client runs when nobody stops it.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// A way to ask: TCP or UDP.
pub(crate) type Way = fn(SocketAddr) -> Ask;

/// Both protocols; UDP with a connected socket, as upstream's clients use it.
pub(crate) const WAYS: [Way; 2] = [Ask::tcp, Ask::udp];

/// Waits until a check holds.
pub(crate) fn soon<T>(check: impl FnMut() -> Result<T>) -> Result<T> {
    eventually(SOON, check)
}

/// Upstream's `DialFromContainer`: within n² + 30 tries exactly these endpoints answer, and each of them does. That no
/// try may fail is ours.
pub(crate) fn dial(client: &Place, ask: &Ask, endpoints: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = endpoints.iter().map(ToString::to_string).collect();
    let tries = endpoints.len() * endpoints.len() + 30;
    let seen: BTreeSet<String> = tally(client, ask, u32::try_from(tries)?)?.into_keys().collect();
    ensure!(seen == wanted, "{} {ask:?}: {seen:?} answered, not {wanted:?}", client.name);
    Ok(())
}

/// The same with both protocols in both families.
pub(crate) fn dial_all(client: &Place, targets: [SocketAddr; 2], endpoints: &[&str]) -> Result<()> {
    ways(targets).iter().try_for_each(|ask| dial(client, ask, endpoints))
}

/// Both protocols towards these.
pub(crate) fn ways(targets: [SocketAddr; 2]) -> Vec<Ask> {
    targets.into_iter().flat_map(|to| WAYS.map(|way| way(to))).collect()
}

/// Upstream's `verifyServeHostnameServiceUp`: every client is answered by every server within 50 requests for each of them.
pub(crate) fn up<'a>(
    clients: impl IntoIterator<Item = &'a Place>,
    targets: [SocketAddr; 2],
    servers: &[&str],
) -> Result<()> {
    for client in clients {
        for to in targets {
            soon(|| {
                let seen = tally(client, &Ask::tcp(to), 50 * u32::try_from(servers.len())?)?;
                let all = servers.iter().all(|name| seen.contains_key(*name)) && seen.len() == servers.len();
                ensure!(all, "{} asks {to}: {seen:?}, not {servers:?}", client.name);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Upstream's `verifyServeHostnameServiceDown`: soon nobody answers, and it stays so.
pub(crate) fn down<'a>(clients: impl IntoIterator<Item = &'a Place>, targets: [SocketAddr; 2]) -> Result<()> {
    at_once(clients, targets, |client, way, to| {
        soon(|| silent(client, &way(to)))?;
        never(client, &way(to))
    })
}

/// Nobody answers, and it stays so.
pub(crate) fn is_down<'a>(
    clients: impl IntoIterator<Item = &'a Place>,
    targets: [SocketAddr; 2],
) -> Result<()> {
    at_once(clients, targets, |client, way, to| never(client, &way(to)))
}

/// All clients ask in all ways at the same time: most of it is waiting.
fn at_once<'a>(
    clients: impl IntoIterator<Item = &'a Place>,
    targets: [SocketAddr; 2],
    check: impl Fn(&Place, Way, SocketAddr) -> Result<()> + Sync,
) -> Result<()> {
    let check = &check;
    let clients: Vec<&Place> = clients.into_iter().collect();
    std::thread::scope(|scope| {
        let mut watchers = Vec::new();
        for client in clients {
            for to in targets {
                for way in [Ask::tcp as Way, new_flow] {
                    watchers.push(scope.spawn(move || check(client, way, to)));
                }
            }
        }
        watchers
            .into_iter()
            .try_for_each(|watcher| watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// UDP from a port that no other request has: a flow that was let in goes on, whatever became of its Service's policy.
fn new_flow(to: SocketAddr) -> Ask {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Below the ports that the kernel chooses from.
    Ask::udp(to).from_port(15_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 15_000)
}

/// One request gets no answer.
pub(crate) fn silent(client: &Place, ask: &Ask) -> Result<()> {
    let request = request(client, &ask.clone().timeout(SHORT))?;
    ensure!(request.answer.is_none(), "{} {ask:?}: {request:?}", client.name);
    Ok(())
}

/// Not one of five requests gets an answer.
pub(crate) fn never(client: &Place, ask: &Ask) -> Result<()> {
    for request in requests(client, &ask.clone().timeout(SHORT), 5)? {
        ensure!(request.answer.is_none(), "{} {ask:?}: {request:?}", client.name);
    }
    Ok(())
}

/// A connection is refused with `ECONNREFUSED` in both families, and so is a connected UDP socket.
pub(crate) fn refused(client: &Place, targets: [SocketAddr; 2]) -> Result<()> {
    ways(targets).iter().try_for_each(|ask| refuses(client, ask))
}

/// One request is refused.
pub(crate) fn refuses(client: &Place, ask: &Ask) -> Result<()> {
    let request = request(client, &ask.clone().timeout(SHORT))?;
    let refused = request.failure.as_ref().is_some_and(|failure| failure.ends_with("ECONNREFUSED"));
    ensure!(refused, "{} {ask:?}: {request:?}", client.name);
    Ok(())
}

/// Upstream's `checkAffinity`: whether the last 15 answers come from one server, each with one request a connection.
pub(crate) fn sticks(client: &Place, ask: &Ask) -> Result<Option<String>> {
    let seen = tally(client, ask, 15)?;
    Ok(if seen.len() == 1 { seen.into_keys().next() } else { None })
}

/// Every answer shows the server this client address.
pub(crate) fn seen_as(client: &Place, targets: [SocketAddr; 2], addresses: [IpAddr; 2]) -> Result<()> {
    for ask in ways(targets) {
        let answer = get(client, &ask)?;
        let seen = answer.peer.ip();
        ensure!(addresses.contains(&seen), "{} {ask:?}: seen as {seen}, not {addresses:?}", client.name);
    }
    Ok(())
}

/// Upstream's `DialEchoFromTestContainer`: 2000 bytes go there and come back.
pub(crate) fn echo(client: &Place, ask: &Ask) -> Result<()> {
    let answer: Answer = get(client, &ask.clone().payload(2000))?;
    ensure!(answer.length == 2000, "{} {ask:?}: {answer:?}", client.name);
    Ok(())
}

/// Upstream's loop of `nc -u -p`: a new socket from the same port five times a second.
pub(crate) fn datagrams(client: &Place, to: SocketAddr, port: u16) -> Result<Runner<Load>> {
    let ask = Ask::udp(to).from_port(port).timeout(Duration::from_millis(500));
    Runner::load(client, &ask, 5, 1, LIMIT)
}

/// New connections, twenty a second.
pub(crate) fn connections(client: &Place, to: SocketAddr) -> Result<Runner<Load>> {
    Runner::load(client, &Ask::tcp(to).timeout(Duration::from_secs(5)), 20, 1, LIMIT)
}

/// Waits until three more answers come, all from this server.
pub(crate) fn follows(load: &mut Runner<Load>, server: &str) -> Result<()> {
    soon(|| {
        let before = load.report()?;
        let after = eventually(Duration::from_secs(5), || {
            let now = load.report()?;
            ensure!(now.made >= before.made + 3, "no answers: {now:?}");
            Ok(now)
        })?;
        let count = |load: &Load| load.names.get(server).copied().unwrap_or(0);
        let from_it = count(&after) - count(&before);
        ensure!(from_it == after.made - before.made, "not only from {server}: {before:?}, {after:?}");
        Ok(())
    })
    .context("the client does not follow")
}

/// A load of which no request has failed.
pub(crate) fn unbroken(load: Runner<Load>) -> Result<()> {
    let load = load.stop()?;
    ensure!(load.failed == 0 && load.made > 0, "{load:?}");
    Ok(())
}
