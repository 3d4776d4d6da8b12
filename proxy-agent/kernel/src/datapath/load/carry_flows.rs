//! Carrying over living flows, while the programs go on with the tables that are left.
//!
//! The records of the old tables are looked through again and again: what is new is entered by the new tables' own program,
//! what has changed is written once more, what has gone is taken apart. Each time there is less of it. The last look but one
//! falls into a pause in which nothing begins, so that all flows are there when the programs are exchanged; the last one comes
//! after that, when nobody works with the old tables any more, and takes what has been noted in between.
//!
//! Until the programs are exchanged nobody else touches the new tables, so what changes in a record may be written from here.
//! Afterwards only what never goes back is.

use std::mem::offset_of;
use std::os::fd::AsFd;

use proxy_common::abi::{FORWARD, Flow, FlowId, Key, Leg, REPLY, Role, State, maps};
use proxy_common::addr::Proto;
use proxy_common::lb::Ring;

use super::generation::{FoundMap, Generation};
use super::object::direct_places;
use crate::datapath::flow::{Adopted, Flows};
use crate::datapath::store::layout::Translation;
use crate::datapath::store::table::{TableError, scan_bytes};
use crate::sys::{self, Elements};

/// Bytes of a word.
const WORD: usize = 8;

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Only the old tables are worked with.
    Before,
    /// The programs have been exchanged, and the old tables are at rest.
    After,
}

/// What is known of an old record.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// The flow that has been carried over from it; 0 for none.
    id: u64,
    /// A sum over its record then.
    digest: u64,
    /// The sum of its masquerade choice then.
    source: u32,
    /// Its record in the new tables.
    new: u32,
}

/// Both tables.
pub(crate) struct FlowCarrier {
    old: Records,
    new: Elements,
    translation: Translation,
    flows: Flows,
    known: Vec<Known>,
    /// What the legs of old flows have last acknowledged, where they know it better than their records.
    acked: Vec<Acked>,
    /// Flows that found no room.
    no_room: usize,
    /// Whether no other programs work with the new tables.
    alone: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Acked {
    id: u64,
    acked: [Option<u32>; 2],
}

/// The old records, in their own layout.
struct Records {
    elements: Elements,
    /// Words of a record.
    words: usize,
    count: usize,
    /// Where the words are that change without anything having happened.
    restless: Vec<usize>,
    id: usize,
    state: usize,
}

impl Records {
    fn open(old: &Generation, map: &FoundMap) -> Result<Option<Self>, TableError> {
        let Some(table) = old.layout.table(maps::RECORDS) else { return Ok(None) };
        let offset =
            |name: &str| table.value.fields.iter().find(|field| field.name == name).map(|field| field.offset);
        let (Some(id), Some(state)) = (offset("id"), offset("state")) else { return Ok(None) };
        let elements = Elements::map(map.fd.as_fd(), &map.facts).map_err(|source| TableError::Call {
            act: "map",
            object: "records".into(),
            map: maps::RECORDS,
            source,
        })?;
        let restless = ["claims", "checked"].into_iter().filter_map(offset).map(|at| at / WORD).collect();
        let words = (map.facts.value_size as usize).div_ceil(WORD);
        let count = map.facts.max_entries as usize;
        Ok(Some(Self { elements, words, count, restless, id: id / WORD, state }))
    }

    fn id(&self, index: usize) -> u64 {
        self.elements.get(index * self.words + self.id)
    }

    /// Whether there is a flow.
    fn is_live(&self, index: usize) -> bool {
        let word = self.elements.get(index * self.words + self.state / WORD);
        let state = State((word >> (self.state % WORD * 8)) as u8);
        matches!(state, State::LIVE | State::LEFT | State::LOST)
    }

    /// The flow in a record, with its id; `None` if there is none, or it came or went at this moment.
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Option<(u64, u64)> {
        let id = self.id(index);
        if !self.is_live(index) {
            return None;
        }
        bytes.clear();
        let mut digest = 0_u64;
        for word in 0..self.words {
            let value = self.elements.get(index * self.words + word);
            bytes.extend(value.to_ne_bytes());
            if !self.restless.contains(&word) {
                // The sum of a hash map that only has to tell what has changed.
                digest = (digest.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
            }
        }
        (self.is_live(index) && self.id(index) == id).then_some((id, digest))
    }
}

impl FlowCarrier {
    /// From the records of one generation to another, whose records are all free, unless others work with them already.
    pub(crate) fn open(old: &Generation, new: &Generation, alone: bool) -> Result<Option<Self>, TableError> {
        let (Some(from), Some(to)) = (old.map(maps::RECORDS), new.map(maps::RECORDS)) else {
            return Ok(None);
        };
        let (Some(theirs), Some(ours)) = (old.layout.table(maps::RECORDS), new.layout.table(maps::RECORDS))
        else {
            return Ok(None);
        };
        let Some(records) = Records::open(old, from)? else { return Ok(None) };
        let elements = Elements::map(to.fd.as_fd(), &to.facts).map_err(|source| TableError::Call {
            act: "map",
            object: "records".into(),
            map: maps::RECORDS,
            source,
        })?;
        let known = vec![Known::default(); records.count];
        let mut carrier = Self {
            acked: vec![Acked::default(); records.count],
            old: records,
            new: elements,
            translation: Translation::of_values(&theirs, &ours),
            flows: Flows::open(&new.root)?,
            known,
            no_room: 0,
            alone,
        };
        carrier.read_legs(old)?;
        Ok(Some(carrier))
    }

    /// The legs of IPv4 take down what TCP acknowledges, and tell their records only now and then.
    fn read_legs(&mut self, old: &Generation) -> Result<(), TableError> {
        let own = crate::datapath::store::layout::Layout::own();
        let tables = (old.layout.table(maps::FLOWS), own.table(maps::FLOWS), old.map(maps::FLOWS));
        let (Some(theirs), Some(ours), Some(map)) = tables else { return Ok(()) };
        let (keys, legs) =
            (Translation::new(&theirs.key, &ours.key), Translation::new(&theirs.value, &ours.value));
        let acked = &mut self.acked;
        scan_bytes(map.fd.as_fd(), &map.facts, maps::FLOWS, &mut |key, leg| {
            let (keys, legs) = (sys::values::<Key>(&keys.apply(key)), sys::values::<Leg>(&legs.apply(leg)));
            let ([key], [leg]) = (&keys[..], &legs[..]) else { return };
            let direction = match leg.role() {
                Role::OUTER => FORWARD,
                Role::MIDDLE => REPLY,
                _ => return,
            };
            if let Some(of) = acked.get_mut(leg.id.index() as usize).filter(|_| key.is_v4()) {
                if of.id != leg.id.0 {
                    *of = Acked { id: leg.id.0, acked: [None; 2] };
                }
                of.acked[direction] = Some(leg.notes().acked);
            }
        })
    }

    /// Looks through all records once; how many had changed.
    pub(crate) fn look(&mut self, stage: Stage) -> Result<usize, TableError> {
        let before = self.alone && stage == Stage::Before;
        let (mut changed, mut gone) = (0, Vec::new());
        let mut bytes = Vec::with_capacity(self.old.words * WORD);
        for index in 0..self.old.count {
            let known = self.known.get(index).copied().unwrap_or_default();
            if known.id == 0 && !self.old.is_live(index) {
                continue;
            }
            let Some((id, digest)) = self.old.read(index, &mut bytes) else {
                // What has gone in the old tables since the programs were exchanged did so while it went on in the new ones.
                if known.id != 0 && before {
                    gone.push(self.new_id(known.new));
                    self.set(index, Known::default());
                }
                changed += 1;
                continue;
            };
            if known.id == id && known.digest == digest {
                continue;
            }
            changed += 1;
            let flow = self.translate(index, id, &bytes);
            let Some(flow) = flow else { continue };
            let same = known.id == id && (known.source == flow.source || !flow.has_source());
            match same {
                true if before => self.write(known.new, &flow),
                true => self.merge(known.new, &flow),
                false => {
                    // Another flow has its record, or it has been given its masquerade port meanwhile.
                    if known.id != 0 && (before || known.id == id) {
                        self.flows.end(&[self.new_id(known.new)])?;
                    }
                    // What began in the old tables while programs were exchanged has perhaps begun in the new ones since.
                    let newer = self.alone && (before || known.id == id);
                    let new = match self.flows.carry(sys::bytes(&flow), newer)? {
                        Adopted::Done(new) | Adopted::Alone(new) | Adopted::Known(new) => new.index(),
                        Adopted::Replaced => continue,
                        Adopted::NoRoom => {
                            self.no_room += 1;
                            continue;
                        }
                    };
                    self.set(index, Known { id, digest, source: flow.source, new });
                    continue;
                }
            }
            self.set(index, Known { digest, ..known });
        }
        for some in gone.chunks(CHUNK) {
            self.flows.end(some)?;
        }
        Ok(changed)
    }

    /// An old record in the new layout.
    fn translate(&self, index: usize, id: u64, bytes: &[u8]) -> Option<Flow> {
        let translated = self.translation.apply(bytes);
        let mut flow = sys::values::<Flow>(&translated).into_iter().next()?;
        let acked = self.acked.get(index).filter(|acked| acked.id == id && flow.proto() == Proto::TCP);
        for direction in [FORWARD, REPLY] {
            if let Some(acked) = acked.and_then(|acked| acked.acked[direction]) {
                // Whoever of both is ahead: sequence numbers go round.
                if acked.wrapping_sub(flow.acked[direction]) < 1 << 31 {
                    flow.acked[direction] = acked;
                }
            }
        }
        Some(flow)
    }

    fn set(&mut self, index: usize, known: Known) {
        if let Some(place) = self.known.get_mut(index) {
            *place = known;
        }
    }

    fn place(new: u32) -> usize {
        new as usize * (size_of::<Flow>() / WORD)
    }

    fn new_id(&self, new: u32) -> FlowId {
        FlowId(self.new.get(Self::place(new) + offset_of!(Flow, id) / WORD))
    }

    /// Writes what an old record says over a new one, but for what is that one's own. Nobody else touches it.
    fn write(&self, new: u32, flow: &Flow) {
        let own = [offset_of!(Flow, id) / WORD, offset_of!(Flow, claims) / WORD];
        for (n, word) in sys::values::<u64>(sys::bytes(flow)).into_iter().enumerate() {
            if !own.contains(&n) {
                self.new.set(Self::place(new) + n, word);
            }
        }
    }

    /// Adds to a new record what an old one has noted last, as far as that never goes back: programs work with the new one.
    fn merge(&self, new: u32, flow: &Flow) {
        let (base, words) = (Self::place(new), sys::values::<u64>(sys::bytes(flow)));
        let latest = [
            offset_of!(Flow, seen),
            offset_of!(Flow, seen) + WORD,
            offset_of!(Flow, rst),
            offset_of!(Flow, rst) + WORD,
        ];
        for at in latest.map(|offset| offset / WORD) {
            let old = words.get(at).copied().unwrap_or(0);
            if self.new.get(base + at) < old {
                self.new.set(base + at, old);
            }
        }
        let base = base * WORD;
        for (at, set) in [
            (offset_of!(Flow, old), flow.old),
            (offset_of!(Flow, fin) + FORWARD, flow.fin[FORWARD]),
            (offset_of!(Flow, fin) + REPLY, flow.fin[REPLY]),
        ] {
            if set != 0 {
                self.new.set_byte(base + at, set);
            }
        }
    }

    /// Lets the young ones stand in the rings of the new tables, in the order in which they came. They stand at the end: newcomers
    /// begin in front of it, with a new ring or in the first half of one that has doubled, and displace nobody before that is full.
    pub(crate) fn fill_rings(&self, new: &Generation) -> Result<(), TableError> {
        let Some(ring) = new.map(maps::RING) else { return Ok(()) };
        let cpus = crate::datapath::tables::cpus::cpus();
        let places = (ring.facts.max_entries / (Ring::COUNT * cpus)).max(1);
        let records = new.map(maps::RECORDS).map_or(0, |records| records.facts.max_entries);
        let direct = direct_places(places, records, cpus);
        let mut young: [Vec<(u64, u64)>; Ring::COUNT as usize] = Default::default();
        for known in self.known.iter().filter(|known| known.id != 0) {
            let base = Self::place(known.new);
            let bytes: Vec<u8> = (0..size_of::<Flow>() / WORD)
                .flat_map(|word| self.new.get(base + word).to_ne_bytes())
                .collect();
            for flow in sys::values::<Flow>(&bytes) {
                let which = if flow.is_own() {
                    Ring::OWN
                } else if flow.is_direct() {
                    Ring::DIRECT
                } else {
                    Ring::of(flow.proto())
                };
                // Of those whose packets are wrapped the old ones keep their places.
                let stands = flow.old == 0 || flow.is_direct();
                if let Some(young) = young.get_mut(which.0 as usize).filter(|_| stands) {
                    young.push((flow.born, flow.id.0));
                }
            }
        }
        let failed =
            |source| TableError::Call { act: "write", object: "young flows".into(), map: maps::RING, source };
        for (which, mut young) in (0..).zip(young) {
            young.sort_unstable();
            let turn = if which == Ring::DIRECT.0 { direct } else { places };
            let count = u32::try_from(young.len()).unwrap_or(u32::MAX);
            for (n, (_, id)) in (0..).zip(young) {
                let (cpu, at) = (n % cpus, n / cpus);
                let of_cpu = (count - cpu).div_ceil(cpus).min(turn);
                if at < of_cpu {
                    let place = (cpu * Ring::COUNT + which) * places + turn - of_cpu + at;
                    sys::update(ring.fd.as_fd(), &place, &id).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    /// How many flows have been carried over, and how many found no room.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.known.iter().filter(|known| known.id != 0).count(), self.no_room)
    }
}

/// Flows that are ended at once.
const CHUNK: usize = 64;
