//! Health and metrics, served from a thread of their own.

use agent_source::api::events::{Event, Events};
use anyhow::{Context, Result};
use tokio::sync::mpsc;

use super::Report;
use crate::config::Config;
use crate::serve;

impl Report {
    /// Serves health and metrics from a thread of their own, so that neither waits for a sync.
    ///
    /// With `--bind-address-hard-fail` the event says why the agent must end.
    pub(in crate::run) fn serve(&self, config: &Config, events: &Events) -> Result<mpsc::Receiver<Event>> {
        let (failing, failed) = mpsc::channel(2);
        let hard = config.hard_fail;
        let (health, metrics) = (self.health.clone(), self.metrics.clone());
        let service_health = self.service_health.server(
            self.health.clone(),
            config.settings.node_name.clone(),
            events.clone(),
            self.connections.clone(),
        );
        let connections = self.connections.clone();
        let (at_health, at_metrics) = (config.healthz, config.metrics);
        let configz = serve::configz::router(config.configz());
        let (begun, begins) = std::sync::mpsc::sync_channel(1);
        let serve = move || {
            // Made here: it must not be dropped where the loop runs, which it would be if there were no thread for it.
            let made =
                tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
            let runtime = match made {
                Ok(runtime) => {
                    begun.send(Ok(())).ok();
                    runtime
                }
                // Nobody waits who is not there.
                Err(error) => return drop(begun.send(Err(error))),
            };
            runtime.block_on(async {
                let health = async {
                    let Some(at) = at_health else { return };
                    if let Err(error) =
                        serve::serve("health", at, hard, serve::health::router(health), &connections).await
                    {
                        lost(&failing, Event::NoHealth(format!("cannot serve health at {at}: {error}")))
                            .await;
                    }
                };
                let metrics = async {
                    let (at, router) = (at_metrics, serve::metrics::router(metrics).merge(configz));
                    if let Err(error) = serve::serve("metrics", at, hard, router, &connections).await {
                        lost(&failing, Event::NoMetrics(format!("cannot serve metrics at {at}: {error}")))
                            .await;
                    }
                };
                tokio::join!(health, metrics, service_health.run());
            });
        };
        std::thread::Builder::new().name("serve".into()).spawn(serve).context("cannot start a thread")?;
        begins
            .recv()
            .context("the thread of the HTTP servers has ended")?
            .context("cannot start the HTTP servers")?;
        Ok(failed)
    }
}

/// Says that an address is not served.
async fn lost(failing: &mpsc::Sender<Event>, event: Event) {
    // An error: the loop has ended, and with it the agent.
    failing.send(event).await.ok();
}
