//! The questions of `rules` put to the real programs: the same tables in the maps of this kernel, packets by
//! `BPF_PROG_TEST_RUN`, sockets of a cgroup that carries the socket programs.

#[cfg(test)]
#[path = "../rules/draw.rs"]
mod draw;
#[cfg(test)]
#[path = "../rules/facts.rs"]
mod facts;
#[cfg(test)]
mod kernel;
#[cfg(test)]
#[path = "../rules/lasting.rs"]
mod lasting;
#[cfg(test)]
#[path = "../rules/objects.rs"]
mod objects;
#[cfg(test)]
#[path = "../rules/oracle.rs"]
mod oracle;
#[cfg(test)]
#[path = "../rules/outcomes.rs"]
mod outcomes;
#[cfg(test)]
#[path = "../rules/scene.rs"]
mod scene;
#[cfg(test)]
mod sockets;
#[cfg(test)]
#[path = "../rules/system.rs"]
mod system;
#[cfg(test)]
#[path = "../rules/trial.rs"]
mod trial;
#[cfg(test)]
#[path = "../rules/vectors.rs"]
mod vectors;

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    use super::kernel::{Kernel, with_kernel};
    use super::{draw, lasting, outcomes, trial::try_all, vectors::every_vector};

    /// Cases unless `PROPTEST_CASES` says otherwise.
    const CASES: u32 = 150;

    #[test]
    fn every_vector_comes_out_as_written() {
        macro_rules! list {
            ($($room:ident::$vector:ident,)*) => { [$($room::$vector as fn(&mut Kernel),)*] };
        }
        let vectors = every_vector!(list);
        with_kernel(|mut kernel| vectors.iter().for_each(|vector| vector(&mut kernel)));
    }

    #[test]
    fn every_flow_gets_from_the_real_programs_what_the_rules_say() {
        let named = std::env::var_os("PROPTEST_CASES").is_some();
        let default = Config::default();
        let cases = if named { default.cases } else { CASES };
        let config = Config { cases, failure_persistence: None, max_shrink_iters: 50, ..default };
        let run = |kernel| {
            let kernel = RefCell::new(kernel);
            let drawn = (draw::facts(), prop::collection::vec(draw::burst(), 0..6));
            let tried = TestRunner::new(config).run(&drawn, |(facts, bursts)| {
                try_all(&mut *kernel.borrow_mut(), facts, &bursts).map_err(TestCaseError::fail)
            });
            tried.map_err(|error| error.to_string())
        };
        if let Err(error) = with_kernel(run) {
            panic!("{error}");
        }
    }
}
