//! The page of `status`, as text.

use super::status::{Remark, SOCKET_PROGRAMS, Status};
use super::table;
use super::view::{MapFill, span};

/// The page for a person.
#[must_use]
pub(super) fn text(status: &Status) -> String {
    let mut page = match status.problems.as_slice() {
        [] => "healthy\n".to_owned(),
        [first, ..] => format!("not healthy: {}\n", first.text),
    };
    for (word, remarks) in [("problem", &status.problems), ("warning", &status.warnings)] {
        for Remark { text, remedy } in remarks {
            page += &format!("  {word}: {text}\n    remedy: {remedy}\n");
        }
    }
    page += "\n";
    page += &table::table(&["PROXY", ""], facts(status));
    if !status.tables.is_empty() {
        let rows = status.tables.iter().map(|table| {
            let MapFill { name, used, max } = *table;
            vec![name.to_owned(), used.to_string(), max.to_string(), format!("{}%", table.percent())]
        });
        page += "\n";
        page += &table::table(&["TABLE", "USED", "MAX", "FILL"], rows.collect());
    }
    if !status.fall_backs.is_empty() {
        let rows = status.fall_backs.iter().map(|one| vec![one.feature.to_owned(), one.meaning.to_owned()]);
        page += "\n";
        page += &table::table(&["THIS KERNEL LACKS", "SO"], rows.collect());
    }
    if !status.reasons.is_empty() {
        let rows = status.reasons.iter().map(|reason| {
            vec![reason.reason.to_owned(), reason.count.to_string(), reason.meaning.to_owned()]
        });
        page += "\n";
        page += &table::table(&["REASON", "COUNT", "MEANING"], rows.collect());
    }
    for (title, lines) in [("WARNINGS", &status.object_warnings), ("NOTES", &status.notes)] {
        if !lines.is_empty() {
            page += "\n";
            page += &table::table(&[title], lines.iter().map(|line| vec![line.clone()]).collect());
        }
    }
    table::plain(&page)
}

/// Name and value of everything that is one line.
fn facts(status: &Status) -> Vec<Vec<String>> {
    let fact = |name: &str, value: String| vec![name.to_owned(), value];
    let mut facts = vec![fact("version", status.version.to_owned()), fact("kernel", status.kernel.clone())];
    let Some(agent) = &status.agent else { return facts };
    let alive = match agent.alive {
        true => format!("alive, pid {}, last heartbeat {} ago", agent.pid, span(agent.beat_age_ms)),
        false => format!("silent for {}, last pid {}", span(agent.beat_age_ms), agent.pid),
    };
    let synced = match (agent.sync_age_ms, agent.queued_age_ms) {
        (None, _) => "never".to_owned(),
        (Some(age), None) => format!("{} ago, generation {}", span(age), agent.generation),
        (Some(age), Some(queued)) => format!("{} ago, changes waiting for {}", span(age), span(queued)),
    };
    let failed = match agent.interfaces_failed {
        0 => String::new(),
        n => format!(", {n} failed"),
    };
    let answers = if agent.connected { "" } else { " (does not answer)" };
    let hooks = match status.socket_hooks.len() {
        0 => "none".to_owned(),
        n => format!("{n} of {}: {}", SOCKET_PROGRAMS.len(), status.socket_hooks.join(" ")),
    };
    facts.extend([
        fact("node", agent.node.clone()),
        fact("source", format!("{}{answers}", agent.source)),
        fact("agent", alive),
        fact("in step", synced),
        fact("services", agent.services.to_string()),
        fact("endpoints", agent.endpoints.to_string()),
        fact("frontends", status.frontends.to_string()),
        fact("interfaces", format!("{} with programs{failed}", agent.interfaces)),
        fact("socket hooks", hooks),
    ]);
    facts
}
