//! A file of manifests that a person wrote, Services and slices together: slices are edited in place.
//!
//! The file keeps its other documents, and a slice its name: what changes is what a cluster's controller would
//! change.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;

use super::ManifestDir;
use crate::object::{Key, Object, Publish};

/// The label that says whose a slice is.
const SERVICE: &str = "kubernetes.io/service-name";

/// One file of a directory of manifests.
#[derive(Debug)]
pub struct ExampleFile<'a> {
    directory: &'a ManifestDir,
    name: String,
    documents: Mutex<Vec<Value>>,
}

impl<'a> ExampleFile<'a> {
    /// Reads a file of the directory.
    pub fn open(directory: &'a ManifestDir, name: &str) -> Result<Self> {
        let path = directory.path().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text)
            .with_context(|| format!("reading {} as YAML", path.display()))?;
        Ok(Self { directory, name: name.into(), documents: Mutex::new(documents) })
    }

    /// The addresses of a Service's endpoints, in the file's order.
    #[must_use]
    pub fn addresses(&self, service: &str) -> Vec<String> {
        let documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        let slices = documents.iter().filter(|document| owner(document) == Some(service));
        let endpoints = slices.filter_map(|slice| slice["endpoints"].as_array()).flatten();
        endpoints.filter_map(|endpoint| endpoint["addresses"][0].as_str().map(ToOwned::to_owned)).collect()
    }

    fn write(&self, documents: &[Value]) -> Result<()> {
        let mut text = String::new();
        for document in documents {
            text.push_str("---\n");
            text.push_str(
                &serde_saphyr::to_string(document)
                    .with_context(|| format!("writing {} as YAML", self.name))?,
            );
        }
        self.directory.write(&self.name, &text)
    }
}

impl Publish for ExampleFile<'_> {
    /// Gives the slice of the same Service and family its new endpoints; adds the object when there is none.
    fn publish(&self, object: &Object) -> Result<()> {
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        let same = documents.iter_mut().find(|document| {
            owner(document).is_some()
                && owner(document) == owner(&object.json)
                && document["addressType"] == object.json["addressType"]
        });
        match same {
            Some(slice) => {
                slice["endpoints"] = object.json["endpoints"].clone();
                slice["ports"] = object.json["ports"].clone();
            }
            None => documents.push(object.json.clone()),
        }
        self.write(&documents)
    }

    fn retract(&self, key: &Key) -> Result<()> {
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        documents.retain(|document| {
            document["kind"] != key.kind.name() || document["metadata"]["name"] != key.name.as_str()
        });
        self.write(&documents)
    }
}

/// The Service a slice belongs to; nothing for what is no slice.
fn owner(document: &Value) -> Option<&str> {
    document["metadata"]["labels"][SERVICE].as_str()
}
