//! What drivers can do with packets of programs (`Documentation/netlink/specs/netdev.yaml`; Linux 6.3).

use super::request::{Flags, Protocol, attributes, exchange, put_text};

/// `CTRL_CMD_GETFAMILY` of family `GENL_ID_CTRL`, with `CTRL_ATTR_FAMILY_NAME`; the answer has `CTRL_ATTR_FAMILY_ID`.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_NAME: u16 = 2;
const FAMILY_ID: u16 = 1;
/// `NETDEV_CMD_DEV_GET`, with `NETDEV_A_DEV_IFINDEX`; the answer has `NETDEV_A_DEV_XDP_FEATURES`.
const DEVICE: u8 = 1;
const IFINDEX: u16 = 1;
const FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`.
const SENDS: u64 = 1 << 2;
/// Length of `struct genlmsghdr`.
const HEADER: usize = 4;

/// Whether the driver of an interface sends what another one hands it. False where the kernel does not say.
pub(crate) fn sends(index: u32) -> bool {
    features(index).is_some_and(|features| features & SENDS != 0)
}

fn features(index: u32) -> Option<u64> {
    let mut body = vec![GET_FAMILY, 1, 0, 0];
    put_text(&mut body, FAMILY_NAME, "netdev");
    let family: [u8; 2] = find(CONTROL, &body, FAMILY_ID)?;
    let mut body = vec![DEVICE, 1, 0, 0];
    // Length and kind of the attribute, then the index.
    body.extend(8_u16.to_ne_bytes().into_iter().chain(IFINDEX.to_ne_bytes()).chain(index.to_ne_bytes()));
    find(u16::from_ne_bytes(family), &body, FEATURES).map(u64::from_ne_bytes)
}

/// An attribute of the answer.
fn find<const N: usize>(family: u16, body: &[u8], wanted: u16) -> Option<[u8; N]> {
    let answers = exchange(Protocol::Generic, family, Flags::Ack, body).ok()?;
    let mut all = answers.iter().flat_map(|answer| attributes(answer, HEADER));
    all.find(|(kind, _)| *kind == wanted)?.1.try_into().ok()
}
