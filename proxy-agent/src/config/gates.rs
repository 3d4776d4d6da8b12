//! Kubernetes' feature gates, as far as a service proxy has to do with them.

use std::collections::BTreeMap;

/// When false, external IPs are not served (V-8).
pub(super) const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";

/// `NAME=BOOL,...`, as Go's flag takes it.
pub(super) fn parse(text: &str) -> Result<BTreeMap<String, bool>, String> {
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
}
