//! Filters on the clsact qdisc: how programs run on interfaces before TCX (6.6).
//!
//! At ingress ours is the first filter, at egress the last. A filter needs no process to stay. Its place is
//! fixed (priority and handle), so the next agent replaces it in one step and `cleanup` finds it.

use std::io;
use std::mem;

use aya::Ebpf;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, tc};
use nix::net::if_::if_indextoname;

use super::Direction;
use crate::netlink::request::{Flags, Protocol, attributes, exchange, put_text, text_of, u32_at};

/// `RTM_DELQDISC` of `linux/rtnetlink.h`.
const DELETE_QDISC: u16 = 37;
/// `RTM_GETTFILTER`.
const GET_FILTER: u16 = 46;
/// `TC_H_CLSACT` of `linux/pkt_sched.h`, where the qdisc hangs.
const CLSACT: u32 = 0xffff_fff1;
/// Its handle.
const QDISC: u32 = 0xffff_0000;
/// Where its ingress filters hang.
const INGRESS: u32 = 0xffff_fff2;
/// Where its egress filters hang.
const EGRESS: u32 = 0xffff_fff3;

/// Ours among the filters of one priority.
const HANDLE: TcHandle = TcHandle::new(0, 0xeb);
/// Before all others.
const FIRST: u16 = 1;
/// After all others: those that name no priority get 49152 and less.
const LAST: u16 = u16::MAX;

/// Why a filter could not be set or removed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The qdisc could not be added.
    #[error("cannot add the clsact qdisc to interface {interface} (CONFIG_NET_CLS_ACT, module sch_ingress)")]
    Qdisc { interface: String, source: Box<TcError> },
    /// The filter could not be set or removed.
    #[error("cannot {act} the filter of program {program} at interface {interface}")]
    Filter {
        /// What was tried.
        act: &'static str,
        program: String,
        interface: String,
        source: Box<ProgramError>,
    },
    /// The qdisc could not be removed.
    #[error("cannot remove the clsact qdisc from interface {interface}")]
    RemoveQdisc { interface: String, source: io::Error },
}

impl FilterError {
    /// Whether the interface has just gone.
    pub(crate) fn is_of_something_gone(&self) -> bool {
        let number = match self {
            Self::Qdisc { source, .. } => match &**source {
                TcError::NetlinkError(error) => error.raw_os_error(),
                _ => None,
            },
            Self::Filter { source, .. } => errno(source),
            Self::RemoveQdisc { source, .. } => source.raw_os_error(),
        };
        number == Some(libc::ENODEV)
    }
}

fn place(direction: Direction) -> (TcAttachType, u16) {
    match direction {
        Direction::Ingress => (TcAttachType::Ingress, FIRST),
        Direction::Egress => (TcAttachType::Egress, LAST),
    }
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error()
        }
        _ => None,
    }
}

/// Adds the qdisc; `false` when it was there.
pub(crate) fn add_qdisc(interface: &str) -> Result<bool, FilterError> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => Ok(true),
        Err(TcError::AlreadyAttached) => Ok(false),
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(FilterError::Qdisc { interface: interface.to_owned(), source: Box::new(error) }),
    }
}

/// Sets our filter, replacing an older one of ours in one step.
pub(crate) fn set(
    ebpf: &mut Ebpf,
    interface: &str,
    direction: Direction,
    program: &str,
) -> Result<(), FilterError> {
    let failed = |act, error| FilterError::Filter {
        act,
        program: program.to_owned(),
        interface: interface.to_owned(),
        source: Box::new(error),
    };
    let (hook, priority) = place(direction);
    let classifier: &mut SchedClassifier = match ebpf.program_mut(program) {
        Some(found) => found.try_into().map_err(|error| failed("set", error))?,
        None => return Err(failed("set", ProgramError::NotLoaded)),
    };
    let options = TcAttachOptions::Netlink(NlOptions { priority, handle: HANDLE, classid: None });
    let id = match classifier.attach_with_options(interface, hook, options) {
        Ok(id) => id,
        Err(error) if errno(&error) == Some(libc::EEXIST) => {
            let older = SchedClassifierLink::attached(interface, hook, priority, HANDLE, None)
                .map_err(|error| failed("find", ProgramError::IOError(error)))?;
            classifier.attach_to_link(older).map_err(|error| failed("replace", error))?
        }
        Err(error) => return Err(failed("set", error)),
    };
    // The filter is to outlive this process; a link that is dropped would take it away.
    mem::forget(classifier.take_link(id).map_err(|error| failed("keep", error))?);
    Ok(())
}

/// The id of the program that our filter runs; `None` where there is no such filter.
pub(crate) fn running(index: u32, direction: Direction) -> io::Result<Option<u32>> {
    /// `TCA_OPTIONS`, and `TCA_BPF_ID` in it.
    const OPTIONS: u16 = 2;
    const PROGRAM: u16 = 11;
    let (_, priority) = place(direction);
    let parent = match direction {
        Direction::Ingress => INGRESS,
        Direction::Egress => EGRESS,
    };
    let mut asked = tc_message(index, HANDLE.into(), parent);
    let every_protocol = u16::to_be(libc::ETH_P_ALL as u16);
    asked.truncate(16);
    asked.extend((u32::from(priority) << 16 | u32::from(every_protocol)).to_ne_bytes());
    // Without this the kernel does not look among filters of its kind.
    put_text(&mut asked, 1, "bpf");
    match exchange(Protocol::Route, GET_FILTER, Flags::Ack, &asked) {
        Ok(answers) => Ok(answers.iter().find_map(|answer| {
            let (_, options) = attributes(answer, 20).find(|(kind, _)| *kind == OPTIONS)?;
            attributes(options, 0).find(|(kind, _)| *kind == PROGRAM).map(|(_, id)| u32_at(id, 0))
        })),
        // No filter, no qdisc, no interface.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// All filters of a direction in the order in which they run: the name of each, and its program's id if it is one of BPF.
pub(crate) fn all(index: u32, direction: Direction) -> io::Result<Vec<(String, Option<u32>)>> {
    /// `TCA_KIND`, `TCA_OPTIONS`; in the latter `TCA_BPF_NAME` and `TCA_BPF_ID`.
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const NAME: u16 = 7;
    const PROGRAM: u16 = 11;
    let parent = match direction {
        Direction::Ingress => INGRESS,
        Direction::Egress => EGRESS,
    };
    let answers = match exchange(Protocol::Route, GET_FILTER, Flags::Dump, &tc_message(index, 0, parent)) {
        Ok(answers) => answers,
        // There is no qdisc.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let mut found: Vec<(u32, (String, Option<u32>))> = Vec::new();
    for answer in &answers {
        let value = |wanted| attributes(answer, 20).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        // A classifier comes before its filters, without options.
        let (Some(kind), Some(options)) = (value(KIND).map(text_of), value(OPTIONS)) else { continue };
        let option =
            |wanted| attributes(options, 0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let is_bpf = kind == "bpf";
        let name = option(NAME).filter(|_| is_bpf).map(text_of);
        let id = option(PROGRAM).filter(|_| is_bpf).map(|id| u32_at(id, 0));
        let priority = u32_at(answer, 16) >> 16;
        let name = name.unwrap_or(kind);
        found.push((priority, (format!("{name} (tc filter, priority {priority})"), id)));
    }
    found.sort_by_key(|(priority, _)| *priority);
    Ok(found.into_iter().map(|(_, filter)| filter).collect())
}

/// Removes our filter, if it and the interface are there.
pub(crate) fn clear(index: u32, direction: Direction) -> Result<(), FilterError> {
    let Some(interface) = name(index) else { return Ok(()) };
    let (hook, priority) = place(direction);
    let Ok(link) = SchedClassifierLink::attached(&interface, hook, priority, HANDLE, None) else {
        return Ok(());
    };
    match aya::programs::links::Link::detach(link) {
        Ok(()) => Ok(()),
        // No filter, no qdisc, no interface.
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(()),
        Err(error) => Err(FilterError::Filter {
            act: "remove",
            program: String::from("tc"),
            interface,
            source: Box::new(error),
        }),
    }
}

/// Removes the qdisc unless others have filters there, too.
pub(crate) fn remove_qdisc(index: u32) -> Result<(), FilterError> {
    let Some(interface) = name(index) else { return Ok(()) };
    let failed = |source| FilterError::RemoveQdisc { interface: interface.clone(), source };
    for parent in [INGRESS, EGRESS] {
        let filters = exchange(Protocol::Route, GET_FILTER, Flags::Dump, &tc_message(index, 0, parent));
        match filters {
            Ok(filters) if filters.is_empty() => {}
            Ok(_) => return Ok(()),
            // The qdisc is gone already.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
    match exchange(Protocol::Route, DELETE_QDISC, Flags::Ack, &tc_message(index, QDISC, CLSACT)) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
            Ok(())
        }
        Err(error) => Err(failed(error)),
    }
}

/// `struct tcmsg` of `linux/rtnetlink.h`.
fn tc_message(index: u32, handle: u32, parent: u32) -> Vec<u8> {
    [0, index, handle, parent, 0].into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn name(index: u32) -> Option<String> {
    if_indextoname(index).ok()?.into_string().ok()
}
