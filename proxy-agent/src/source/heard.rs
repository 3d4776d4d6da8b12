//! Objects as they come over the wire: decodable or not, each has a name.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

/// An object as the server sent it: one that cannot be decoded still has a name, and does not take the
/// whole list down with it.
#[derive(Clone, Debug)]
pub(super) struct Heard<K> {
    pub(super) metadata: ObjectMeta,
    pub(super) object: Result<K, String>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Heard<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let metadata = value.get("metadata").map(ObjectMeta::deserialize).transpose();
        let metadata = metadata.map_err(serde::de::Error::custom)?.unwrap_or_default();
        let object = K::deserialize(value).map_err(|error| error.to_string());
        Ok(Self { metadata, object })
    }
}

impl<K: kube::Resource<DynamicType = ()>> kube::Resource for Heard<K> {
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
