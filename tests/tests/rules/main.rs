//! Who answers, with which source address, refused or dropped: the proxy against an independent reading of
//! the rules, over clusters drawn at random that change step by step. Here without a kernel: `rules-kernel` puts the
//! same questions to the real programs.

#[cfg(test)]
mod crowd;
#[cfg(test)]
mod draw;
#[cfg(test)]
mod facts;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod host;
#[cfg(test)]
mod lasting;
#[cfg(test)]
mod objects;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod outcomes;
#[cfg(test)]
mod scene;
#[cfg(test)]
mod system;
#[cfg(test)]
mod trial;
#[cfg(test)]
mod vectors;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::Config;

    use super::{draw, host::Host, lasting, outcomes, trial::try_all, vectors::every_vector};

    macro_rules! vectors {
        ($($room:ident::$vector:ident,)*) => {$(
            #[test]
            fn $vector() {
                $room::$vector(&mut Host::default());
            }
        )*};
    }

    every_vector!(vectors);

    proptest! {
        #![proptest_config(Config { failure_persistence: None, max_shrink_iters: 400, ..Config::default() })]

        #[test]
        fn every_flow_gets_what_the_rules_say_after_every_change(
            facts in draw::facts(),
            bursts in prop::collection::vec(draw::burst(), 0..6),
        ) {
            try_all(&mut Host::default(), facts, &bursts).map_err(TestCaseError::fail)?;
        }
    }
}
