//! The invariants of ARCHITECTURE.md that can be seen in the source text: who may name what, and what must be
//! absent. A test may name anything: lines after a file's `#[cfg(test)]` do not count, save for [`ABSENT`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// Words that must not occur in some folder (or must not occur outside of some).
struct Rule {
    id: &'static str,
    why: &'static str,
    words: &'static [&'static str],
    /// The folders and files that the rule is about.
    within: &'static [&'static str],
    /// Those among them that may.
    except: &'static [&'static str],
}

const RULES: [Rule; 4] = [
    Rule {
        id: "I1",
        why: "model and plan are plain functions: no kernel, no cluster, no runtime, no clock",
        words: &["aya", "kube", "k8s_openapi", "tokio", "Instant::now", "SystemTime::now"],
        within: &["proxy-agent/src/model", "proxy-agent/src/plan"],
        except: &[],
    },
    Rule {
        id: "I2",
        why: "Kubernetes' types stop at source/",
        words: &["k8s_openapi", "kube::"],
        within: &["proxy-agent/src"],
        except: &["proxy-agent/src/source", "proxy-agent/src/cli"],
    },
    Rule {
        id: "I2",
        why: "only datapath/ names aya (the command line may: it reads the tables through datapath's types)",
        words: &["aya", "aya_log"],
        within: &["proxy-agent/src"],
        except: &["proxy-agent/src/datapath", "proxy-agent/src/cli"],
    },
    Rule {
        id: "I2",
        why: "only netlink/ names netlink",
        words: &["rtnetlink", "netlink_packet_route"],
        within: &["proxy-agent/src"],
        except: &["proxy-agent/src/netlink"],
    },
];

/// What no file may hold, tests included. (In pieces, so that this file passes too.)
const ABSENT: [(&str, &str); 3] = [
    (concat!("to", "do!("), "finish it"),
    (concat!("unimple", "mented!("), "finish it"),
    (concat!("#[ig", "nore"), "a test runs or is deleted"),
];

/// The folders with Rust code of ours.
const CODE: [&str; 6] = ["proxy-common", "proxy-agent", "proxy-ebpf", "xtask", "tests", "deploy"];

/// Fails with every line that breaks a rule.
pub(crate) fn check() -> Result<()> {
    let root = workspace::root();
    let mut broken = Vec::new();
    let mut files = 0;
    for folder in CODE {
        for file in rust_files(&root.join(folder))? {
            let text =
                fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
            let name = file.strip_prefix(&root).unwrap_or(&file);
            broken.extend(violations(name, &text));
            files += 1;
        }
    }
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    println!("{files} files: {} rules hold, and nothing is unfinished", RULES.len());
    Ok(())
}

/// The Rust files below a folder, in order, without what is built.
pub(crate) fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return Ok(files) };
    for entry in entries {
        let path = entry.with_context(|| format!("could not list {}", folder.display()))?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// What is wrong with a file, a line for each.
fn violations(file: &Path, text: &str) -> Vec<String> {
    let rules: Vec<&Rule> = RULES.iter().filter(|rule| rule.covers(file)).collect();
    let mut broken = Vec::new();
    let mut in_tests = file.file_name().is_some_and(|name| name == "tests.rs");
    for (line, text) in (1..).zip(text.lines()) {
        let place = format!("{}:{line}", file.display());
        in_tests |= text.trim() == "#[cfg(test)]";
        let code = text.split("//").next().unwrap_or_default();
        for (word, what) in ABSENT.iter().filter(|(word, _)| code.contains(word)) {
            broken.push(format!("{place}: `{word}`: {what}"));
        }
        for rule in rules.iter().filter(|_| !in_tests) {
            for word in rule.words.iter().filter(|word| names(code, word)) {
                broken.push(format!("{place}: names `{word}` ({}: {})", rule.id, rule.why));
            }
        }
    }
    broken
}

impl Rule {
    fn covers(&self, file: &Path) -> bool {
        let under = |folders: &[&str]| {
            folders
                .iter()
                .any(|folder| file.starts_with(folder) || file == Path::new(&format!("{folder}.rs")))
        };
        under(self.within) && !under(self.except)
    }
}

/// Whether the code holds the word as a name of its own, not as a part of a longer one or of a string.
fn names(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || "_\"-./".contains(c);
    code.match_indices(word).any(|(at, _)| {
        let before = code.get(..at).and_then(|text| text.chars().next_back());
        let after = code.get(at + word.len()..).and_then(|text| text.chars().next());
        let ends = word.ends_with("::") || !after.is_some_and(part);
        !before.is_some_and(part) && ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(file: &str, text: &str) -> usize {
        violations(Path::new(file), text).len()
    }

    #[test]
    fn the_model_may_not_name_the_kernel_the_cluster_or_the_clock() {
        assert_eq!(broken("proxy-agent/src/model/mod.rs", "use aya::maps::Array;"), 2, "I1 and I2");
        assert_eq!(broken("proxy-agent/src/plan/ids.rs", "let now = std::time::Instant::now();"), 1);
        assert_eq!(broken("proxy-agent/src/model/mod.rs", "// why not aya\nlet kubelet = kube_proxy();"), 0);
    }

    #[test]
    fn each_foreign_thing_has_one_door() {
        assert_eq!(broken("proxy-agent/src/serve/mod.rs", "use k8s_openapi::api::core::v1::Service;"), 1);
        assert_eq!(
            broken("proxy-agent/src/source/convert.rs", "use k8s_openapi::api::core::v1::Service;"),
            0
        );
        assert_eq!(broken("proxy-agent/src/run.rs", "let handle = rtnetlink::new_connection();"), 1);
        assert_eq!(broken("proxy-agent/src/datapath/load.rs", "let loader = aya::EbpfLoader::new();"), 0);
        assert_eq!(broken("tests/src/lib.rs", "use aya::Ebpf;"), 0);
    }

    #[test]
    fn tests_may_name_anything_but_may_not_be_switched_off() {
        let text = "#[cfg(test)]\nmod tests {\n    use aya::Ebpf;\n";
        assert_eq!(broken("proxy-agent/src/model/mod.rs", text), 0);
        let off = format!("{text}    {}]\n", ABSENT[2].0);
        assert_eq!(broken("proxy-agent/src/model/mod.rs", &off), 1);
    }

    #[test]
    fn unfinished_code_is_found_everywhere() {
        assert_eq!(broken("xtask/src/main.rs", &format!("    {})", ABSENT[0].0)), 1);
        assert_eq!(broken("proxy-ebpf/src/main.rs", &format!("    {})", ABSENT[1].0)), 1);
    }
}
