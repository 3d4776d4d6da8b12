//! Objects off the wire: decoded or not, each has a name.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

/// An object of a list or a watch. One that cannot be decoded still has a name, and does not fail the whole list.
#[derive(Clone, Debug)]
pub(in crate::api) struct Decoded<K> {
    pub(super) metadata: ObjectMeta,
    pub(super) object: Result<K, String>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Decoded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let metadata = value.get("metadata").unwrap_or(&serde_json::Value::Null);
        let metadata = ObjectMeta::deserialize(metadata).unwrap_or_else(|_| identity(metadata));
        let object = K::deserialize(value).map_err(|error| error.to_string());
        Ok(Self { metadata, object })
    }
}

/// The name and resource version in metadata that cannot be decoded.
fn identity(metadata: &serde_json::Value) -> ObjectMeta {
    let text = |key: &str| metadata.get(key)?.as_str().map(str::to_owned);
    ObjectMeta {
        name: text("name"),
        namespace: text("namespace"),
        resource_version: text("resourceVersion"),
        ..ObjectMeta::default()
    }
}

impl<K: kube::Resource<DynamicType = ()>> kube::Resource for Decoded<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(dt: &()) -> Cow<'_, str> {
        K::kind(dt)
    }
    fn group(dt: &()) -> Cow<'_, str> {
        K::group(dt)
    }
    fn version(dt: &()) -> Cow<'_, str> {
        K::version(dt)
    }
    fn plural(dt: &()) -> Cow<'_, str> {
        K::plural(dt)
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use kube::api::ObjectList;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    ///
    #[test]
    fn one_item_that_cannot_be_read_does_not_take_the_list_down() {
        let metadata = |labels: Value| json!({ "name": "web", "namespace": "shop", "labels": labels });
        let list = json!({ "apiVersion": "v1", "kind": "ServiceList", "metadata": { "resourceVersion": "7" }, "items": [
            { "metadata": metadata(json!(5)) },
            { "metadata": metadata(json!({})), "spec": 5 },
            { "metadata": metadata(json!({})), "spec": { "clusterIP": "10.96.0.1" } },
        ] });
        let list: ObjectList<Decoded<Service>> = serde_json::from_value(list).expect("a list");
        assert_eq!(
            list.items.iter().map(|item| item.object.is_ok()).collect::<Vec<_>>(),
            [false, false, true]
        );
        assert!(list.items.iter().all(|item| item.metadata.name.as_deref() == Some("web")));
    }

    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("name|labels|annotations|spec|ports", inner, 0..4)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

        ///
        #[test]
        fn whatever_an_object_says_it_keeps_its_name(
            key in "labels|annotations|ownerReferences|creationTimestamp|finalizers|generation",
            odd in anything(),
            spec in anything(),
            name in "[a-z]{1,8}",
        ) {
            let object = json!({ "metadata": { "name": name.clone(), key: odd }, "spec": spec });
            let decoded: Decoded<Service> = serde_json::from_value(object).expect("what any object becomes");
            prop_assert_eq!(decoded.metadata.name, Some(name));
        }

        #[test]
        fn what_is_no_object_harms_nobody(odd in anything(), spec in anything()) {
            for object in [odd.clone(), json!({ "metadata": odd, "spec": spec })] {
                prop_assert!(serde_json::from_value::<Decoded<Service>>(object).is_ok());
            }
        }
    }
}
