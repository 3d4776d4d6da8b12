//! What the fuzz targets do, with examples that are mutated at random. `PROPTEST_CASES` makes it longer.
#![cfg(test)]

use std::cell::Cell;
use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "a crate of its own for the fuzz targets")]
mod targets;

/// Something else at some place of a text.
#[derive(Clone, Debug)]
enum Mutation {
    Insert(String),
    Remove(usize),
    /// The line of another place.
    Copy(Index),
    Scalar(&'static str),
}

const SCALARS: [&str; 16] = [
    "null",
    "~",
    "''",
    "[]",
    "{}",
    "0",
    "-1",
    "1e999",
    "65536",
    "18446744073709551616",
    "true",
    "::1",
    "0s",
    "-5m",
    "*a",
    "&a [*a]",
];

fn mutations() -> impl Strategy<Value = Vec<(Index, Mutation)>> {
    let mutation = prop_oneof![
        "\\PC{0,6}|[ \t\n:{}\\[\\]&*!|>'\"%@`,-]{1,4}".prop_map(Mutation::Insert),
        (1_usize..40).prop_map(Mutation::Remove),
        any::<Index>().prop_map(Mutation::Copy),
        prop::sample::select(&SCALARS[..]).prop_map(Mutation::Scalar),
    ];
    vec((any::<Index>(), mutation), 0..5)
}

fn mutated(text: &str, mutations: &[(Index, Mutation)]) -> String {
    let mut text = text.to_owned();
    for (place, mutation) in mutations {
        let places: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let at = *place.get(&places);
        let line = |at: usize| {
            let begin = text[..at].rfind('\n').map_or(0, |n| n + 1);
            begin..text[at..].find('\n').map_or(text.len(), |n| at + n + 1)
        };
        match mutation {
            Mutation::Insert(more) => text.insert_str(at, more),
            Mutation::Remove(number) => {
                let end = text[at..].char_indices().nth(*number).map_or(text.len(), |(n, _)| at + n);
                text.replace_range(at..end, "");
            }
            Mutation::Copy(other) => {
                let copied = text[line(*other.get(&places))].to_owned();
                text.insert_str(line(at).start, &copied);
            }
            Mutation::Scalar(scalar) => {
                let line = line(at);
                let value = text[line.clone()].find(": ").map_or(line.start, |n| line.start + n + 2);
                let end = text[value..line.end].trim_end().len() + value;
                text.replace_range(value..end, scalar);
            }
        }
    }
    text
}

/// Tries a target with mutated examples; some of them must be of use, and some not.
fn try_all(examples: &[String], target: impl Fn(&str) -> bool) {
    let plain = Config::default();
    let (cases, useful) = (plain.cases, Cell::new(0));
    TestRunner::new(Config { failure_persistence: None, max_shrink_iters: 400, ..plain })
        .run(&(any::<Index>(), mutations()), |(example, mutations)| {
            let text = mutated(example.get::<String>(examples), &mutations);
            useful.set(useful.get() + u32::from(target(&text)));
            Ok(())
        })
        .unwrap();
    assert!(cases < 64 || (1..cases).contains(&useful.get()), "{useful:?} of {cases} can be read");
}

fn texts(folder: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|file| fs::read_to_string(file).unwrap()).collect()
}

#[test]
fn whatever_a_manifest_says_is_read_or_said_to_be_wrong() {
    //
    try_all(&texts("../deploy/examples"), |text| targets::manifest(text)[0] > 0);
}

#[test]
fn settings_that_can_be_followed_can_be_written_and_read_again() {
    // F-2, F-6.
    try_all(&texts("fuzz/seeds/configuration"), targets::configuration);
}
