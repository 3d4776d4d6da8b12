//! What clusters are told: Services, EndpointSlices, Nodes, and who plays Kubernetes' endpoint controller.

mod controller;
mod directory;
mod example;
mod service;
mod slice;

pub use controller::{EndpointController, Phase};
pub use directory::ManifestDir;
pub use example::ExampleFile;
pub use service::{ServicePlan, node, service_cidr};
pub use slice::{Family, SlicePlan};
