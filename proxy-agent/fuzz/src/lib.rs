//! What fuzz targets do with their texts. `proxy-agent/tests/fuzz.rs` does the same with mutated examples.

use std::io;
use std::path::Path;

use agent_kernel::datapath::store::pin::BpfRoot;
use agent_source::manifests::manifest;
use clap::Parser;
use proxy_agent::config::{Config, ConfigErrors, Host, RunArgs};

/// A file of a manifest directory, as YAML and as JSON. Returns how many objects and how many faults were in it.
///
/// Whatever it says, it is read the same way twice, and what is wrong is said in lines that name a place in it.
pub fn manifest(text: &str) -> [usize; 2] {
    let mut seen = [0; 2];
    for json in [false, true] {
        let read = || manifest::read(text, json, "n1");
        let first = read();
        assert_eq!(first, read(), "read twice");
        let (objects, faults) = match first {
            Ok(manifest) => (manifest.objects, manifest.faults),
            Err(fault) => (Vec::new(), vec![fault]),
        };
        let lines = text.lines().count().max(1) as u64;
        for fault in &faults {
            assert!((1..=lines + 1).contains(&fault.line), "{fault:?} of {lines} lines");
            is_a_line(&fault.text);
        }
        objects.iter().flat_map(|object| &object.warnings).for_each(|warning| is_a_line(warning));
        seen[0] += objects.len();
        seen[1] += faults.len();
    }
    seen
}

/// A file for `--config`. Returns whether it can be followed.
///
/// What can be followed can be written out, and the file that is written means the same.
pub fn configuration(text: &str) -> bool {
    match read(text) {
        Ok(config) => {
            let written = config.to_file().expect("settings can be written");
            let again = read(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
            assert_eq!(again.kube_proxy, config.kube_proxy, "{written}");
            assert_eq!(again.to_file().as_ref(), Ok(&written));
            config.warnings.iter().for_each(|warning| is_a_line(warning));
            true
        }
        Err(ConfigErrors(errors)) => {
            assert!(!errors.is_empty(), "refused, and nothing is wrong");
            false
        }
    }
}

fn is_a_line(text: &str) {
    assert!(!text.is_empty() && !text.contains('\n'), "{text:?} is not a line");
}

/// Where the text stands on the host that is made up here.
const FILE: &str = "/etc/config.conf";

fn read(text: &str) -> Result<Config, ConfigErrors> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }
    let line = ["run", "--config", FILE, "--manifests", "/etc/manifests"];
    let args = Line::try_parse_from(line).expect("flags that there are").run;
    Config::new(&args, Path::new(BpfRoot::DEFAULT), &MadeUp(text))
}

/// A host with one file.
struct MadeUp<'a>(&'a str);

impl Host for MadeUp<'_> {
    fn hostname(&self) -> io::Result<String> {
        Ok("n1".to_owned())
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        match path.to_str() {
            Some(FILE) => Ok(self.0.to_owned()),
            Some("/proc/net/if_inet6") => Ok(String::new()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn env(&self, _name: &str) -> Option<String> {
        None
    }

    fn netns_cookie(&self) -> u64 {
        1
    }

    fn cpus(&self) -> u64 {
        8
    }
}
