use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::model::Peer;

const PORT: u16 = 10261;
const SECOND: u64 = 1_000_000;

fn target(number: u32) -> Target {
    Target { name: format!("node-{number}").into(), number }
}

fn at(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), PORT)
}

fn key(node: u32) -> TunnelKey {
    TunnelKey { node, family: V4 }
}

fn way() -> Way {
    Way { from: "10.0.0.1".parse().unwrap(), link: 2, mtu: 1500 }
}

/// So many nodes with an agent each, at 10.1.x.y.
fn cluster(count: u32) -> (Vec<Target>, Peers) {
    let targets: Vec<Target> = (1..=count).map(target).collect();
    let ip = |n: u32| at(&format!("10.1.{}.{}", n / 250, n % 250 + 1));
    let peer = |n: u32| Peer { v4: Some(ip(n)), v6: None, ready: true };
    let peers = targets.iter().map(|target| (target.name.clone(), peer(target.number))).collect();
    (targets, peers)
}

/// One node that is asked once a second.
struct One {
    tunnels: Tunnels,
    now: u64,
    asked: u64,
    /// What the table would have, if it is written only when something is said to have changed.
    written: BTreeMap<TunnelKey, Tunnel>,
}

impl One {
    fn new() -> Self {
        Self::over(Tunnels::default())
    }

    fn over(mut tunnels: Tunnels) -> Self {
        let (targets, peers) = cluster(1);
        tunnels.follow(&targets, &peers);
        Self { tunnels, now: 0, asked: 0, written: BTreeMap::new() }
    }

    /// Its turn, a second after the last one.
    fn ask(&mut self) {
        let due = self.tunnels.due(self.now).expect("its turn");
        assert_eq!(due, Due { key: key(1), to: at("10.1.0.2") });
        assert_eq!(self.tunnels.due(self.now), None, "once");
        self.now += SECOND;
        self.asked += 1;
        self.tunnels.routed(&due.key, Ok(way()));
        self.tunnels.asked(&due.key, self.asked);
    }

    fn answer(&mut self) {
        assert!(self.tunnels.answered(self.asked, at("10.1.0.2")));
    }

    fn ready(&mut self) -> bool {
        if self.tunnels.take_changed() {
            self.written = self.tunnels.entries();
        }
        assert_eq!(self.written, self.tunnels.entries(), "a change that was not said");
        self.written.get(&key(1)).is_some_and(Tunnel::is_ready)
    }

    fn reach(&self) -> Reach {
        self.tunnels.standings()[0].reach.clone()
    }
}

#[test]
fn two_answers_in_a_row_make_a_node_ready_and_three_missing_ones_end_that() {
    // Each letter is a question: `A` is answered, `-` is not. What follows: `.` not ready, `R` ready.
    for (story, ready) in [
        ("AA", ".R"),
        ("A-AA", "...R"),
        ("---", "..."),
        ("AA--A", ".RRRR"),
        // A missing answer is known to be missing when it is asked again.
        ("AA---A", ".RRRR."),
        ("AA---AA", ".RRRR.R"),
        ("AA--A---A", ".RRRRRRR."),
    ] {
        let mut one = One::new();
        let mut seen = String::new();
        for question in story.chars() {
            one.ask();
            if question == 'A' {
                one.answer();
            }
            seen.push(if one.ready() { 'R' } else { '.' });
        }
        assert_eq!(seen, ready, "{story}");
    }
}

#[test]
fn what_a_node_lacks_is_said() {
    let mut one = One::new();
    assert_eq!(one.reach(), Reach::Asking);
    (0..4).for_each(|_| one.ask());
    assert_eq!((one.reach(), one.tunnels.missing()), (Reach::NoAnswer, 3));
    one.answer();
    assert_eq!(one.reach(), Reach::Asking);
    one.ask();
    one.answer();
    assert_eq!(one.reach(), Reach::Directly);
    one.tunnels.routed(&key(1), Err("no route to host".to_owned()));
    assert_eq!((one.reach(), one.ready()), (Reach::NoWay("no route to host".to_owned()), false));
    assert_eq!(one.tunnels.entries()[&key(1)].ifindex, 2, "flows that are there keep the way that there was");
    one.ask();
    one.answer();
    assert!(!one.ready(), "what was answered before counts no more");
    one.ask();
    one.answer();
    assert!(one.ready());
    one.tunnels.refused([key(1)]);
    assert_eq!(one.reach(), Reach::Full);
    for reach in [one.reach(), Reach::NoAgent, Reach::Blocked(Block::NoRight), Reach::NotAsked(String::new())]
    {
        assert!(Reach::LABELS.contains(&reach.label()), "{reach:?}");
    }
}

#[test]
fn what_cannot_be_sent_counts_as_not_answered_and_its_reason_is_kept() {
    let mut one = One::new();
    for _ in 0..2 {
        one.ask();
        one.answer();
    }
    for ready in [true, true, false] {
        let due = one.tunnels.due(one.now).unwrap();
        one.now += SECOND;
        one.tunnels.not_asked(&due.key, "operation not permitted".to_owned());
        assert_eq!(one.ready(), ready);
    }
    assert_eq!(one.reach(), Reach::NotAsked("operation not permitted".to_owned()));
    one.ask();
    assert_eq!(one.reach(), Reach::NoAnswer);
}

#[test]
fn only_an_answer_to_the_last_question_from_whom_it_was_for_counts() {
    let mut one = One::new();
    one.ask();
    assert!(!one.tunnels.answered(1, at("10.1.0.3")), "from somebody else");
    assert!(!one.tunnels.answered(1, SocketAddr::new("10.1.0.2".parse().unwrap(), 53)), "from another port");
    assert!(!one.tunnels.answered(7, at("10.1.0.2")), "to another question");
    one.ask();
    assert!(!one.tunnels.answered(1, at("10.1.0.2")), "too late");
    one.answer();
    assert!(!one.tunnels.answered(2, at("10.1.0.2")), "twice");
}

#[test]
fn what_the_table_says_counts_after_a_restart_until_answers_say_otherwise() {
    let mut before = One::new();
    for _ in 0..2 {
        before.ask();
        before.answer();
    }
    let found = before.tunnels.entries();
    let mut one = One::over(Tunnels::new(&found, PORT));
    assert_eq!(one.tunnels.entries(), found, "nothing to be written");
    (0..3).for_each(|_| one.ask());
    assert_eq!(one.tunnels.entries(), found);
    one.ask();
    assert!(!one.ready());

    // Its agent is not there for the moment: the address that the table has is asked at the usual port.
    let mut tunnels = Tunnels::new(&found, PORT);
    tunnels.follow(&[target(1)], &Peers::new());
    assert_eq!((tunnels.entries(), tunnels.due(0).unwrap().to), (found.clone(), at("10.1.0.2")));

    // Nodes that no Service asks for any more stay for the flows that go there, and nothing new does.
    let mut tunnels = Tunnels::new(&found, PORT);
    tunnels.follow(&[], &Peers::new());
    let left: BTreeMap<_, _> = found.iter().map(|(key, way)| (*key, Tunnel { flags: 0, ..*way })).collect();
    assert_eq!((tunnels.entries(), tunnels.next_us(0)), (left.clone(), None));
    assert!(tunnels.standings().is_empty());
    let mut next = Tunnels::new(&left, PORT);
    next.follow(&[], &Peers::new());
    assert_eq!(next.entries(), left, "whoever comes next leaves them, too");
    // Asked for again, it is known how to get there.
    tunnels.follow(&[target(1)], &Peers::new());
    assert_eq!((tunnels.entries(), tunnels.due(0).unwrap().to), (left, at("10.1.0.2")));
}

#[test]
fn an_address_is_kept_while_its_agent_is_replaced_and_another_one_is_asked_anew() {
    let mut one = One::new();
    for _ in 0..2 {
        one.ask();
        one.answer();
    }
    one.tunnels.follow(&[target(1)], &Peers::new());
    assert!(one.ready());
    one.ask();
    one.answer();

    let peers = |ip: &str, port| {
        let v4 = Some(SocketAddr::new(ip.parse().unwrap(), port));
        Peers::from([(target(1).name, Peer { v4, ..Peer::default() })])
    };
    one.tunnels.follow(&[target(1)], &peers("10.1.0.2", 999));
    assert!(one.ready(), "another port of the same agent");
    one.tunnels.follow(&[target(1)], &peers("10.1.0.7", PORT));
    let entry = one.tunnels.entries()[&key(1)];
    assert_eq!((IpAddr::from(entry.to), entry.is_ready()), ("10.1.0.7".parse().unwrap(), false));
}

#[test]
fn each_family_is_asked_on_its_own_and_a_node_without_an_agent_is_named() {
    let both = Peer { v4: Some(at("10.0.0.2")), v6: Some(at("fd00::2")), ready: true };
    let mut tunnels = Tunnels::default();
    tunnels.follow(&[target(1), target(2)], &Peers::from([(target(1).name, both)]));
    let asked: Vec<SocketAddr> =
        (0..4).filter_map(|n| tunnels.due(n * SECOND / 2)).map(|due| due.to).collect();
    assert_eq!(asked, ["10.0.0.2", "fd00::2", "10.0.0.2", "fd00::2"].map(at));
    let said: Vec<_> = tunnels.standings().into_iter().map(|s| (s.node, s.family, s.reach)).collect();
    assert_eq!(
        said,
        [
            ("node-1".into(), Some(Family::V4), Reach::Asking),
            ("node-1".into(), Some(Family::V6), Reach::Asking),
            ("node-2".into(), None, Reach::NoAgent),
        ]
    );
}

#[test]
fn nobody_is_asked_or_reached_while_that_is_blocked() {
    let mut one = One::new();
    for _ in 0..2 {
        one.ask();
        one.answer();
    }
    one.tunnels.block(Some(Block::NoRight));
    assert_eq!((one.ready(), one.tunnels.next_us(one.now)), (false, None));
    assert_eq!((one.tunnels.due(one.now), one.reach()), (None, Reach::Blocked(Block::NoRight)));
    assert!(!one.tunnels.entries().is_empty(), "flows that are there go on");
    one.tunnels.block(None);
    one.ask();
    assert_eq!(one.reach(), Reach::Asking);
}

/// When each node is asked within a time, looked at every so often.
fn asked(count: u32, seconds: u64, look_us: usize) -> Vec<(u64, u32)> {
    let (targets, peers) = cluster(count);
    let mut tunnels = Tunnels::default();
    tunnels.follow(&targets, &peers);
    let mut all = Vec::new();
    for now in (0..seconds * SECOND).step_by(look_us) {
        while let Some(due) = tunnels.due(now) {
            all.push((now, due.key.node));
        }
    }
    all
}

#[test]
fn each_is_asked_once_a_second_and_more_than_a_hundred_less_often() {
    let per_node = |count, seconds| {
        let all = asked(count, seconds, 1_000);
        let times = |node| all.iter().filter(|(_, of)| *of == node).count() as u64;
        let least = (1..=count).map(times).min().unwrap();
        let most = (1..=count).map(times).max().unwrap();
        (least, most)
    };
    assert_eq!(per_node(1, 20), (20, 20));
    assert_eq!(per_node(7, 20), (20, 20));
    assert_eq!(per_node(100, 20), (20, 20));
    assert_eq!(per_node(1_000, 20), (2, 2));
}

proptest! {
    #[test]
    fn no_second_has_more_than_a_hundred_questions_and_none_of_them_come_at_once(
        count in 1_u32..600,
        look_us in 500_usize..9_000,
    ) {
        let all: Vec<u64> = asked(count, 4, look_us).into_iter().map(|(at, _)| at).collect();
        for (i, from) in all.iter().enumerate() {
            let within = all[i..].iter().take_while(|at| **at < from + SECOND).count();
            prop_assert!(within <= 101, "{} of {} in a second", within, count);
        }
        let apart = (SECOND / u64::from(count)).max(10_000);
        for pair in all.windows(2) {
            prop_assert!(pair[1] - pair[0] + look_us as u64 >= apart, "{:?} of {}", pair, count);
        }
    }

    #[test]
    fn who_sleeps_makes_up_for_nothing(sleeps in prop::collection::vec(0_u64..5 * SECOND, 1..40), count in 1_u32..300) {
        let (targets, peers) = cluster(count);
        let mut tunnels = Tunnels::default();
        tunnels.follow(&targets, &peers);
        let mut now = 0;
        for sleep in sleeps {
            now += sleep;
            let mut at_once = 0;
            while tunnels.due(now).is_some() {
                at_once += 1;
            }
            prop_assert!(at_once <= 2, "{}", at_once);
            prop_assert!(tunnels.next_us(now).unwrap() > now);
        }
    }
}
