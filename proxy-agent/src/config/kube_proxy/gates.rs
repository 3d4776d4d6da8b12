//! Kubernetes' feature gates, as far as a service proxy has to do with them.

use std::collections::BTreeMap;

/// When false, external IPs are not served (V-8).
pub(in crate::config) const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";

/// Gates that change nothing here, misspelt ones among them: every release knows other names, and one that this
/// program has not heard of is no reason not to start.
pub(in crate::config) fn without_effect(gates: &BTreeMap<String, bool>) -> Option<String> {
    let others: Vec<&str> = gates.keys().map(String::as_str).filter(|name| *name != EXTERNAL_IPS).collect();
    (!others.is_empty()).then(|| format!("these feature gates have no effect here: {}", others.join(", ")))
}

/// `NAME=BOOL,...`, as Go's flag takes it.
pub(in crate::config) fn parse(text: &str) -> Result<BTreeMap<String, bool>, String> {
    let gate = |item: &str| {
        let (name, value) =
            item.split_once('=').ok_or_else(|| format!("{item:?} is not NAME=true or NAME=false"))?;
        match value.trim() {
            "true" | "True" | "TRUE" | "t" | "T" | "1" => Ok((name.trim().to_owned(), true)),
            "false" | "False" | "FALSE" | "f" | "F" | "0" => Ok((name.trim().to_owned(), false)),
            _ => Err(format!("{item:?} is not NAME=true or NAME=false")),
        }
    };
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(gate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_names_with_a_truth() {
        // F-11.
        let gates = parse("AllAlpha=true, AllowServiceExternalIPs=false,").unwrap();
        assert_eq!(gates, [("AllAlpha".into(), true), (EXTERNAL_IPS.into(), false)].into());
        assert_eq!(parse(""), Ok(BTreeMap::new()));
        for text in ["AllAlpha", "AllAlpha=", "AllAlpha=maybe"] {
            assert!(parse(text).unwrap_err().contains(text));
        }
    }

    #[test]
    fn a_gate_of_another_component_or_release_is_named() {
        // V-8, F-11.
        let gates =
            parse("AllAlpha=true,AllowServiceExternalIPs=false,AllowServiceExternalIP=false").unwrap();
        let said = without_effect(&gates).unwrap();
        assert_eq!(said, "these feature gates have no effect here: AllAlpha, AllowServiceExternalIP");
        assert_eq!(without_effect(&parse("AllowServiceExternalIPs=true").unwrap()), None);
    }
}
