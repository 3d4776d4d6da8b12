//! What the fuzz targets do, with random bytes. `PROPTEST_CASES` makes it longer.
#![cfg(test)]

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use proxy_common::abi::Reason;

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "a crate of its own for the fuzz targets")]
mod targets;

#[test]
fn nothing_that_comes_breaks_the_tables_or_a_checksum() {
    let plain = Config::default();
    let cases = plain.cases;
    let met = RefCell::new(BTreeSet::new());
    TestRunner::new(Config { cases: plain.cases * 8, failure_persistence: None, ..plain })
        .run(&vec(any::<u8>(), 0..600), |bytes| {
            met.borrow_mut().extend(targets::packets(&bytes).into_keys());
            Ok(())
        })
        .unwrap();
    // Sound tables that nothing comes to would prove nothing.
    for reason in [Reason::NewFlow, Reason::NoEndpoint, Reason::IcmpTranslated, Reason::UndefinedPort] {
        assert!(cases < 256 || met.borrow().contains(&reason), "{reason:?} was never met, only {met:?}");
    }
}
