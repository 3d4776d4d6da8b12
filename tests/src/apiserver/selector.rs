//! Label and field selectors, as far as a service proxy uses them. What is not understood is refused, never ignored.

use serde_json::Value;

/// Which objects a list or a watch is about.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    namespace: Option<String>,
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    Present(String),
    Absent(String),
    Equal(String, String),
    Different(String, String),
}

impl Filter {
    /// Reads the selectors of a request.
    pub(super) fn new(namespace: Option<String>, labels: &str, fields: &str) -> Result<Self, String> {
        let fields = parse(fields)?;
        for field in &fields {
            match field {
                Requirement::Equal(path, _) | Requirement::Different(path, _)
                    if [
                        "metadata.name",
                        "metadata.namespace",
                        "spec.clusterIP",
                        "spec.type",
                        "spec.nodeName",
                    ]
                    .contains(&&**path) => {}
                other => return Err(format!("field selector not supported: {other:?}")),
            }
        }
        Ok(Self { namespace, labels: parse(labels)?, fields })
    }

    /// Whether an object is selected.
    pub(super) fn selects(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        let field = |path: &str| {
            Some(path.split('.').fold(object, |at, step| &at[step]).as_str().unwrap_or_default())
        };
        self.namespace.as_ref().is_none_or(|namespace| field("metadata.namespace") == Some(namespace))
            && self.labels.iter().all(|requirement| requirement.holds(label))
            && self.fields.iter().all(|requirement| requirement.holds(field))
    }
}

impl Requirement {
    fn holds<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> bool {
        match self {
            Self::Present(key) => value(key).is_some(),
            Self::Absent(key) => value(key).is_none(),
            Self::Equal(key, wanted) => value(key) == Some(wanted),
            Self::Different(key, unwanted) => value(key) != Some(unwanted),
        }
    }
}

fn parse(selector: &str) -> Result<Vec<Requirement>, String> {
    selector.split(',').map(str::trim).filter(|part| !part.is_empty()).map(parse_one).collect()
}

fn parse_one(part: &str) -> Result<Requirement, String> {
    let requirement = if let Some((key, value)) = part.split_once("!=") {
        Requirement::Different(key.trim().into(), value.trim().into())
    } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        Requirement::Equal(key.trim().into(), value.trim().into())
    } else if let Some(key) = part.strip_prefix('!') {
        Requirement::Absent(key.trim().into())
    } else {
        Requirement::Present(part.into())
    };
    // Sets (`key in (a, b)`) fall apart at their commas: their pieces hold a space or a bracket.
    if part.contains([' ', '(', ')']) {
        Err(format!("selector not supported: {part}"))
    } else {
        Ok(requirement)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_select_as_kubernetes_does() {
        let object = json!({
            "metadata": { "name": "web", "namespace": "shop", "labels": { "tier": "front", "empty": "" } },
            "spec": { "clusterIP": "None" }
        });
        let cases: &[(Option<&str>, &str, &str, bool)] = &[
            (None, "", "", true),
            (Some("shop"), "", "", true),
            (Some("other"), "", "", false),
            (None, "tier", "", true),
            (None, "!tier", "", false),
            (None, "!absent,tier=front", "", true),
            (None, "tier!=front", "", false),
            (None, "absent!=front", "", true),
            (None, "empty=", "", true),
            (None, "", "spec.clusterIP!=None", false),
            (None, "", "metadata.name==web,spec.clusterIP=None", true),
            (None, "", "metadata.name=other", false),
        ];
        for (namespace, labels, fields, selected) in cases {
            let filter = Filter::new(namespace.map(Into::into), labels, fields).unwrap();
            assert_eq!(filter.selects(&object), *selected, "{namespace:?} {labels} {fields}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(Filter::new(None, "tier in (front,back)", "").is_err());
        assert!(Filter::new(None, "", "status.phase=Running").is_err());
        assert!(Filter::new(None, "", "metadata.name").is_err());
    }
}
