//! kube-proxy's configuration file: read strictly, and, where only a name is odd, leniently with a warning (F-2).

use serde::Deserialize;
use serde_json::Value;
use serde_saphyr::options::DuplicateKeyPolicy;

use super::duration::GoDuration;
use super::v1alpha1::{API_VERSION, KIND, KubeProxyConfiguration};

/// What a file says.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::config) struct Decoded {
    /// With defaults for what it does not say.
    pub(in crate::config) configuration: KubeProxyConfiguration,
    /// What was passed over.
    pub(in crate::config) warnings: Vec<String>,
}

/// Fields whose zero (`""`, `0`, `0s`) means their default, because installers write out what is unset.
const ZERO_IS_UNSET: [&str; 16] = [
    "/bindAddress",
    "/healthzBindAddress",
    "/metricsBindAddress",
    "/configSyncPeriod",
    "/clientConnection/contentType",
    "/clientConnection/qps",
    "/clientConnection/burst",
    "/iptables/syncPeriod",
    "/iptables/minSyncPeriod",
    "/nftables/syncPeriod",
    "/nftables/minSyncPeriod",
    "/ipvs/syncPeriod",
    "/ipvs/minSyncPeriod",
    "/logging/flushFrequency",
    "/logging/verbosity",
    "/logging/format",
];

/// The configuration that a file's text means, YAML or JSON.
pub(in crate::config) fn decode(text: &str) -> Result<Decoded, String> {
    let mut warnings = Vec::new();
    let mut value: Value = match serde_saphyr::from_str(text) {
        Ok(value) => value,
        // Unknown names are found below; a name that stands twice, here.
        Err(strict) => {
            let lenient = serde_saphyr::options! { duplicate_keys: DuplicateKeyPolicy::LastWins };
            let value = serde_saphyr::from_str_with_options(text, lenient)
                .map_err(|e| format!("is not YAML: {e}"))?;
            let strict = strict.to_string();
            warnings
                .push(format!("a field stands twice, and its last value counts: {}", first_line(&strict)));
            value
        }
    };
    kind(&value)?;
    unset(&mut value);
    sections(&value)?;
    let mut unknown = Vec::new();
    let configuration = serde_ignored::deserialize(&value, |path| unknown.push(path.to_string()))
        .map_err(|e: serde_json::Error| format!("is no {KIND}: {e}"))?;
    warnings.extend(unknown.into_iter().map(|path| format!("there is no field {path}: it is passed over")));
    Ok(Decoded { configuration, warnings })
}

/// The configuration as a file that says the same.
pub(in crate::config) fn encode(configuration: &KubeProxyConfiguration) -> Result<String, String> {
    // By way of a value: then it is in order of names, as installers write it.
    let value = super::fields::value(configuration);
    serde_saphyr::to_string(&value).map_err(|e| e.to_string())
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn kind(value: &Value) -> Result<(), String> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Kind {
        api_version: String,
        kind: String,
    }
    let missing = || format!("is no {KIND}: it has no apiVersion and kind");
    let object = value.as_object().map(|_| value).ok_or_else(missing)?;
    let found = Kind::deserialize(object).map_err(|_| missing())?;
    if found.api_version == API_VERSION && found.kind == KIND {
        return Ok(());
    }
    Err(format!(
        "has kind {:?} of {:?}: {KIND:?} of {API_VERSION:?} is needed",
        found.kind, found.api_version
    ))
}

/// A list in the place of a section would be taken for its fields in order.
fn sections(value: &Value) -> Result<(), String> {
    let default = super::fields::value(&KubeProxyConfiguration::default());
    let names = default.as_object().into_iter().flatten().filter(|(_, default)| default.is_object());
    for (name, _) in names {
        if value.get(name).is_some_and(|found| !found.is_object()) {
            return Err(format!("is no {KIND}: {name} must have fields"));
        }
    }
    Ok(())
}

/// Takes away what is there and says nothing: nulls anywhere (F-5), and zeros where they mean a default.
fn unset(value: &mut Value) {
    for path in ZERO_IS_UNSET {
        if let Some(found) = value.pointer_mut(path)
            && is_zero(found)
        {
            *found = Value::Null;
        }
    }
    without_nulls(value);
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty() || text.parse() == Ok(GoDuration::default()),
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => false,
    }
}

fn without_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, value| !value.is_null());
        map.values_mut().for_each(without_nulls);
    }
}
