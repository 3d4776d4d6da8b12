//! What Deployments do to a Service: a rolling update, blue/green, recreate; and Services that come and go.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Fault, Next};
use crate::chaos::clients::looked;
use crate::chaos::ground::Ground;
use crate::chaos::services::{GUEST, REBORN, STAYING, publish};
use crate::crowd::now_ms;
use crate::manifests::Phase;
use crate::object::{Key, Kind};
use crate::probe::{Ask, get};
use crate::stop::pause;

/// What has been begun at an endpoint that leaves may be at its end after this time.
const GRACE: Duration = Duration::from_millis(300);

/// Nothing is remembered from round to round.
pub(super) struct Churn;

impl Fault for Churn {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        ground.settle();
        match number % 4 {
            0 => rolling(ground)?,
            1 => blue_green(ground)?,
            2 => recreate(ground)?,
            _ => guest(ground)?,
        }
        Ok(Next::More)
    }
}

/// Waits until the tables say what was published, and then for what was begun before.
fn quiet(ground: &mut Ground<'_>, step: &str) -> Result<()> {
    ground.clients.step(step);
    let begun = now_ms();
    let outcome = ground.in_line();
    ground.clients.note("the agent", "tables as published", begun, looked(outcome, step));
    pause(GRACE)
}

/// One after the other of the pods that do not stay is replaced: surge, then retire.
fn rolling(ground: &mut Ground<'_>) -> Result<()> {
    for (new, old) in [("d", None), ("f", Some("d")), ("e", Some("f")), ("g", Some("e"))] {
        let cluster = ground.cluster;
        ground.moving.set(cluster.place(new), Phase::Starting)?;
        ground.serve(new)?;
        ground.moving.set(cluster.place(new), Phase::Ready)?;
        quiet(ground, &format!("rolling: {new} is ready"))?;
        if let Some(old) = old {
            leave(ground, old)?;
        }
    }
    leave(ground, "g")
}

/// A pod is told to end, ends, and is gone.
fn leave(ground: &mut Ground<'_>, pod: &str) -> Result<()> {
    let cluster = ground.cluster;
    ground.moving.set(cluster.place(pod), Phase::Terminating)?;
    quiet(ground, &format!("{pod} terminates"))?;
    ground.end_server(pod)?;
    ground.moving.set(cluster.place(pod), Phase::Stopped)?;
    ground.moving.remove(pod)
}

/// All that do not stay are exchanged in one edit, and back.
fn blue_green(ground: &mut Ground<'_>) -> Result<()> {
    let (blue, green) = (["d", "f"], ["e", "g"]);
    for pod in blue.iter().chain(&green) {
        ground.serve(pod)?;
    }
    for pods in [&blue[..], &green, &blue, &[]] {
        ground.move_to(pods)?;
        quiet(ground, &format!("blue/green: {pods:?} beside {STAYING:?}"))?;
    }
    blue.iter().chain(&green).try_for_each(|pod| ground.end_server(pod))
}

/// All pods of a Service end before others begin. While they terminate they serve; then refusals are right.
fn recreate(ground: &mut Ground<'_>) -> Result<()> {
    for (old, new) in [(["r1", "r2"], ["n1", "n2"]), (["n1", "n2"], ["r1", "r2"])] {
        let cluster = ground.cluster;
        let set = |ground: &mut Ground<'_>, pods: [&str; 2], phase| {
            let controller = ground.controller(REBORN)?;
            pods.iter().try_for_each(|pod| controller.set(cluster.place(pod), phase))
        };
        ground.clients.step(format!("recreate: {old:?} terminate"));
        set(ground, old, Phase::Terminating)?;
        pause(GRACE)?;
        ground.clients.order(&format!("may-refuse {REBORN}"))?;
        ground.clients.step(format!("recreate: {old:?} have stopped"));
        set(ground, old, Phase::Stopped)?;
        pause(GRACE)?;
        for pod in old {
            ground.end_server(pod)?;
            ground.controller(REBORN)?.remove(pod)?;
        }
        for pod in new {
            ground.serve(pod)?;
        }
        set(ground, new, Phase::Ready)?;
        ground.clients.step(format!("recreate: {new:?} are ready"));
        // Whoever was refused before has been told so by then.
        let begun = now_ms();
        let outcome = ground.serves(REBORN, &new);
        ground.clients.note("the agent", "new endpoints in the tables", begun, outcome);
        ground.clients.order(&format!("must-serve {REBORN}"))?;
    }
    Ok(())
}

/// A Service appears, is used, and goes.
fn guest(ground: &mut Ground<'_>) -> Result<()> {
    let cluster = ground.cluster;
    ground.clients.step("a Service appears");
    let begun = now_ms();
    let mut controller = publish(ground.to, &GUEST)?;
    controller.set(cluster.place("b"), Phase::Ready)?;
    let outcome = ground.serves(GUEST.name, &["b"]);
    ground.clients.note("the agent", "the new Service in the tables", begun, outcome);
    let asks = [
        ("a", GUEST.cluster_ips()),
        ("node1", GUEST.cluster_ips()),
        ("outside", cluster.place("node1").at(GUEST.node_port)),
    ];
    for (client, targets) in asks {
        for to in targets {
            for ask in [Ask::tcp(to), Ask::udp(to)] {
                let begun = now_ms();
                let outcome = get(cluster.place(client), &ask).and_then(|answer| {
                    ensure!(answer.name == "b", "{} answered", answer.name);
                    Ok(())
                });
                ground.clients.note(&format!("{client}: {to}"), "an answer from b", begun, outcome);
            }
        }
    }
    controller.withdraw()?;
    ground.to.retract(&Key { kind: Kind::Service, namespace: "default".into(), name: GUEST.name.into() })?;
    quiet(ground, "a Service goes")
}
