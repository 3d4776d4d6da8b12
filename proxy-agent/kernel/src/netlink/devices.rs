//! Devices as far as one wants to know who else gets at their packets: kind, and the program that sees frames first.

use std::io;

use super::request::{Flags, Protocol, attributes, exchange, text_of, u32_at};

/// `RTM_GETLINK` of `linux/rtnetlink.h`.
const GET_LINK: u16 = 18;
/// Length of `struct ifinfomsg`.
const HEADER: usize = 16;

/// A device of this thread's network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// The kernel's word for its kind; empty for hardware.
    pub(crate) kind: String,
    /// Id of the XDP program.
    pub(crate) xdp: Option<u32>,
}

/// All of them.
pub(crate) fn devices() -> io::Result<Vec<Device>> {
    let answers = exchange(Protocol::Route, GET_LINK, Flags::Dump, &[0; HEADER])?;
    Ok(answers.iter().map(|answer| device(answer)).collect())
}

fn device(answer: &[u8]) -> Device {
    // `IFLA_IFNAME`, `IFLA_LINKINFO` with `IFLA_INFO_KIND`, `IFLA_XDP` with `IFLA_XDP_PROG_ID`.
    let [name, info, kind, xdp, program] = [3, 18, 1, 43, 4_u16];
    let value = |body, at, wanted| attributes(body, at).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
    let inner = |outer, wanted| value(answer, HEADER, outer).and_then(|body| value(body, 0, wanted));
    Device {
        index: u32_at(answer, 4),
        name: value(answer, HEADER, name).map(text_of).unwrap_or_default(),
        kind: inner(info, kind).map(text_of).unwrap_or_default(),
        xdp: inner(xdp, program).map(|id| u32_at(id, 0)).filter(|id| *id != 0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::{put, put_text};
    use super::*;

    #[test]
    fn kind_and_first_program_are_read_from_a_link() {
        let mut answer = vec![0; HEADER];
        answer[4] = 7;
        put_text(&mut answer, 3, "lxc0");
        let (mut info, mut xdp) = (Vec::new(), Vec::new());
        put_text(&mut info, 1, "netkit");
        put(&mut xdp, 2, &[1]);
        put(&mut xdp, 4, &42_u32.to_ne_bytes());
        put(&mut answer, 18, &info);
        put(&mut answer, 43, &xdp);
        let found = Device { index: 7, name: "lxc0".into(), kind: "netkit".into(), xdp: Some(42) };
        assert_eq!(device(&answer), found);
        assert_eq!(device(&answer[..HEADER]), Device { index: 7, ..Device::default() });
    }

    #[test]
    fn this_machine_has_a_loopback_device() {
        assert!(devices().unwrap().iter().any(|device| device.name == "lo" && device.xdp.is_none()));
    }
}
