//! A place where hosts run: one folder with everything in it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::database::{self, Database, perfectqueue_table};
use crate::program::compiled;

/// A temporary folder with `laelaps.yml`, `plugins/`, `marks/` (granted to guests as `/marks`) and, on SQLite,
/// `queue.db`. Gone when dropped.
#[derive(Debug)]
pub struct Site {
    folder: TempDir,
    database: Database,
    url: String,
}

impl Site {
    /// A new site.
    pub async fn new() -> Self {
        let folder = TempDir::with_prefix("laelaps-").expect("a temporary folder");
        let url = database::url(folder.path()).await;
        let site = Self { folder, database: database::database(), url };
        for folder in ["plugins", "marks"] {
            fs::create_dir(site.path(folder)).expect("a new folder");
        }
        site.configure(json!({}));
        site
    }

    /// The database that the running test's sites are on.
    #[must_use]
    pub fn database_of_the_test() -> Database {
        database::database()
    }

    /// The site's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The database under the site.
    #[must_use]
    pub fn database(&self) -> Database {
        self.database
    }

    /// The queue's URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A path inside the site.
    #[must_use]
    pub fn path(&self, relative: &str) -> PathBuf {
        self.folder().join(relative)
    }

    /// Writes the configuration: quick defaults, and every type routed to the plugin `zoo` with `/marks` granted; `changes` replaces members
    /// of the section, null removes one.
    pub fn configure(&self, changes: Value) {
        let mut section = json!({
            "type": "rdb",
            "url": self.url,
            "plugins": self.path("plugins"),
            "plugin_cache": compiled(),
            "processors": 2,
            "poll_interval": 0.1,
            // Tests count finished tasks, however long a busy machine takes until the last one is.
            "retention_time": 86_400,
            // What kills its hosts is given up as soon as it may be.
            "suspicion_time": 0,
            "routes": [self.route(json!({ "pattern": "." }))],
        });
        let members = section.as_object_mut().expect("a section is an object");
        if matches!(self.database, Database::Postgres | Database::MariaDb) {
            // A machine that is busy with all tests at once makes no host look dead.
            members.insert("host_timeout".to_owned(), json!(600));
        }
        if self.database == Database::PerfectQueue {
            members.extend([
                ("type".to_owned(), json!("rdb_compat")),
                ("table".to_owned(), json!(perfectqueue_table())),
                ("side_table".to_owned(), json!(true)),
            ]);
        }
        for (name, value) in changes.as_object().expect("changes are an object") {
            if value.is_null() {
                members.remove(name)
            } else {
                members.insert(name.clone(), value.clone())
            };
        }
        // JSON is YAML.
        let text = serde_json::to_string_pretty(&json!({ "development": section })).expect("JSON");
        fs::write(self.path("laelaps.yml"), text).expect("the configuration can be written");
    }

    /// A route to the plugin `zoo` with the folder `marks` granted, writable, as `/marks`; `changes` replaces members.
    #[must_use]
    pub fn route(&self, changes: Value) -> Value {
        let mut route = json!({
            "plugin": "zoo",
            "grants": { "folders": [{ "host": self.path("marks"), "guest": "/marks", "writable": true }] },
        });
        let members = route.as_object_mut().expect("a route is an object");
        members.extend(changes.as_object().expect("changes are an object").clone());
        route
    }

    /// Puts a component into the plugin folder as good deployments do: written beside, then renamed over.
    pub fn plug(&self, plugin: &str, component: &[u8]) {
        let beside = self.path(&format!("plugins/.{plugin}.new"));
        fs::write(&beside, component).expect("the plugin folder can be written");
        fs::rename(&beside, self.plugin_path(plugin)).expect("a rename within a folder");
    }

    /// Puts the guest of this name into the plugin folder under its own name.
    pub fn plug_guest(&self, name: &str) {
        self.plug(name, &crate::guest(name));
    }

    /// The file of a plugin.
    #[must_use]
    pub fn plugin_path(&self, plugin: &str) -> PathBuf {
        self.path(&format!("plugins/{plugin}.wasm"))
    }

    /// The lines that guests left in a file of `marks/`, oldest first; a mark is `KEY ATTEMPT`.
    #[must_use]
    pub fn marks(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path("marks").join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Opens the gate for guests whose data names `/marks/NAME` as their gate.
    pub fn open_gate(&self, name: &str) {
        fs::write(self.path("marks").join(name), "open").expect("marks can be written");
    }
}
