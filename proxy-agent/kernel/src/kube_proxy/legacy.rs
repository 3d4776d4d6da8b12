//! iptables of old, whose tables are no part of nf_tables: looked at in the kernel, edited by the programs that
//! know them, where there are any. Without them it is told what to run where.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use super::choose::{self, Chain, Removal, Rule};
use super::{Act, Leftover, name, names, stays, unknown};
use crate::kube_proxy::xtables;
use agent_core::model::Family;

/// What to do to a table: input for `iptables-restore --noflush`, which does all of it or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Edit {
    program: &'static str,
    input: String,
}

/// The programs: of the table's family, for reading and for writing.
struct Programs {
    save: &'static str,
    restore: &'static str,
}

/// Names under which distributions have them; the plain ones may also be those of nf_tables.
fn programs(family: Family) -> [Programs; 2] {
    match family {
        Family::V4 => [
            Programs { save: "iptables-legacy-save", restore: "iptables-legacy-restore" },
            Programs { save: "iptables-save", restore: "iptables-restore" },
        ],
        Family::V6 => [
            Programs { save: "ip6tables-legacy-save", restore: "ip6tables-legacy-restore" },
            Programs { save: "ip6tables-save", restore: "ip6tables-restore" },
        ],
    }
}

/// What kube-proxy has left in legacy tables. Nothing is loaded that is not in use already.
pub(super) fn leftovers(family: Family) -> Vec<Leftover> {
    let (mut tables, mut found) = (Vec::new(), Vec::new());
    for table in tables_in_use(family) {
        match xtables::chains(family, table) {
            Ok(chains) if chains.iter().any(|chain| names::is_chain(table, chain)) => tables.push(table),
            Ok(_) => {}
            Err(error) => found.push(unknown(&table_of(family, table), &error)),
        }
    }
    if tables.is_empty() {
        return found;
    }
    match programs(family).into_iter().find(is_legacy) {
        Some(programs) => {
            found.extend(tables.into_iter().flat_map(|table| of_table(family, table, &programs)));
        }
        None => found.push(no_programs(family, &tables)),
    }
    found
}

fn table_of(family: Family, table: &str) -> String {
    format!("legacy iptables table {table} ({})", name(family))
}

/// The legacy tables that exist in this network namespace, of those that matter.
fn tables_in_use(family: Family) -> Vec<&'static str> {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // No such file: a kernel without them.
    let names = std::fs::read_to_string(file).unwrap_or_default();
    names::TABLES.into_iter().filter(|table| names.lines().any(|line| line == *table)).collect()
}

/// Whether a program is there and speaks to the old tables: the new ones name nf_tables in their version.
fn is_legacy(programs: &Programs) -> bool {
    let version = Command::new(programs.save).arg("--version").output();
    version
        .is_ok_and(|out| out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("nf_tables"))
}

fn no_programs(family: Family, tables: &[&str]) -> Leftover {
    Leftover {
        what: format!("legacy iptables ({}): tables {}", name(family), tables.join(", ")),
        act: Act::Not(
            "hold chains of kube-proxy, and there is no iptables-legacy-restore here to remove them with: run \
             this command where it is installed, or `kube-proxy --cleanup` from its own image, or restart the node"
                .to_owned(),
        ),
    }
}

fn of_table(family: Family, table: &str, programs: &Programs) -> Vec<Leftover> {
    let what = || table_of(family, table);
    let saved = match Command::new(programs.save).args(["-t", table]).output() {
        Ok(saved) if saved.status.success() => String::from_utf8_lossy(&saved.stdout).into_owned(),
        Ok(saved) => return vec![unknown(&what(), &String::from_utf8_lossy(&saved.stderr).trim())],
        Err(error) => return vec![unknown(&what(), &error)],
    };
    let (chains, rules) = parse(&saved);
    let removal = choose::removal(table, &chains, rules);
    let mut found = stays(table, "iptables-legacy", family, &removal);
    if !removal.chains.is_empty() {
        let what = format!("{} ({})", removal.describe(table, "iptables-legacy"), name(family));
        let edit = Edit { program: programs.restore, input: input(table, &removal) };
        found.insert(0, Leftover { what, act: Act::Legacy(edit) });
    }
    found
}

/// Chains and rules of what `iptables-save` prints for one table. A rule is known by its own text.
fn parse(saved: &str) -> (Vec<Chain>, Vec<Rule<String>>) {
    let mut found = (Vec::new(), Vec::new());
    for line in saved.lines() {
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (name, policy) = (words.next().unwrap_or_default(), words.next());
            found.0.push(Chain { name: name.to_owned(), base: policy != Some("-") });
        } else if let Some(rule) = line.strip_prefix("-A ") {
            found.1.push(Rule {
                chain: rule.split(' ').next().unwrap_or_default().to_owned(),
                leads_to: target(rule).into_iter().collect(),
                id: rule.to_owned(),
            });
        }
    }
    found
}

/// Where a rule jumps or goes to: the word after the last `-j` or `-g` that is no part of a quoted comment.
fn target(rule: &str) -> Option<String> {
    let mut quoted = false;
    let mut escaped = false;
    let outside: String = rule
        .chars()
        .filter(|&c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            quoted ^= ends;
            !quoted && !ends
        })
        .collect();
    let words: Vec<&str> = outside.split(' ').collect();
    let to = words.windows(2).rev().find(|pair| matches!(pair, ["-j" | "-g", _]))?;
    to.get(1).map(|to| (*to).to_owned())
}

/// The removal as `iptables-restore --noflush` reads it: a chain that is named is emptied first.
fn input(table: &str, removal: &Removal<String>) -> String {
    let mut input = format!("*{table}\n");
    removal.chains.iter().for_each(|chain| input += &format!(":{chain} - [0:0]\n"));
    removal.jumps.iter().for_each(|rule| input += &format!("-D {}\n", rule.id));
    removal.chains.iter().for_each(|chain| input += &format!("-X {chain}\n"));
    input + "COMMIT\n"
}

/// Does what was found to be done.
pub(super) fn apply(edit: &Edit) -> io::Result<()> {
    let mut child = Command::new(edit.program)
        .args(["--noflush", "--wait"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(edit.input.as_bytes())?;
    }
    let done = child.wait_with_output()?;
    match done.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&done.stderr);
            Err(io::Error::other(format!("{} said: {}", edit.program, said.trim())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
# Generated by iptables-save
*nat
:PREROUTING ACCEPT [1:60]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment \"not -j KUBE-SERVICES, \\\" really\" -j MINE
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j KUBE-SVC-A
-A MINE -j MARK --set-xmark 0x1/0xffffffff
COMMIT
";

    #[test]
    fn what_is_saved_becomes_an_edit_that_touches_nothing_else() {
        let (chains, rules) = parse(SAVED);
        let removal = choose::removal("nat", &chains, rules);
        assert_eq!(
            input("nat", &removal),
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n\
             -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -X KUBE-SERVICES\n-X KUBE-SVC-A\nCOMMIT\n"
        );
    }

    #[test]
    fn without_programs_it_says_where_to_look() {
        let said = no_programs(Family::V4, &["nat"]).to_string();
        assert!(said.contains("tables nat") && said.contains("iptables-legacy-restore"), "{said}");
    }
}
