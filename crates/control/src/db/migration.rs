//! The tables, as the steps that lead to them. A step that was once released is never edited.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::*;

pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Beginning), Box::new(Snapshots), Box::new(Traffic), Box::new(Egress)]
    }
}

/// Teams, their keys, templates and capsules, and the hosts.
struct Beginning;

impl MigrationName for Beginning {
    fn name(&self) -> &str {
        "m0001_beginning"
    }
}

fn table(name: &'static str) -> TableCreateStatement {
    Table::create().table(name).col(pk_uuid("id")).to_owned()
}

fn belongs(table: &'static str, column: &'static str, to: &'static str) -> ForeignKeyCreateStatement {
    ForeignKey::create().from(table, column).to(to, "id").to_owned()
}

#[async_trait::async_trait]
impl MigrationTrait for Beginning {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let teams = table("teams")
            .col(text("name"))
            .col(text_uniq("slug"))
            .col(timestamp_with_time_zone("created_at"))
            .to_owned();
        let api_keys = table("api_keys")
            .col(uuid("team_id"))
            .col(text("name"))
            // SHA-256 of the whole key, in hexadecimal; the key itself is nowhere.
            .col(text_uniq("key_hash"))
            .col(text("key_prefix"))
            .col(timestamp_with_time_zone("created_at"))
            .foreign_key(&mut belongs("api_keys", "team_id", "teams"))
            .to_owned();
        let templates = table("templates")
            .col(uuid("team_id"))
            .col(text("name"))
            .col(text("kind"))
            .col(integer("vcpus"))
            .col(integer("memory_mb"))
            .col(big_integer("size_bytes"))
            // The name under which hosts keep it.
            .col(text("image"))
            .col(boolean("protected"))
            .col(json_binary("default_env"))
            .col(json_binary("metadata"))
            .col(timestamp_with_time_zone("created_at"))
            .foreign_key(&mut belongs("templates", "team_id", "teams"))
            .index(Index::create().unique().name("templates_of_team").col("team_id").col("name"))
            .to_owned();
        let hosts = table("hosts").col(text("address")).col(timestamp_with_time_zone("created_at")).to_owned();
        let capsules = table("capsules")
            .col(uuid("team_id"))
            .col(uuid("host_id"))
            // The name stays readable when the template is long gone.
            .col(text("template"))
            .col(integer("vcpus"))
            .col(integer("memory_mb"))
            .col(integer("disk_size_mb"))
            .col(integer("timeout_sec"))
            // What we want, and what its host says: never one column.
            .col(text("desired"))
            .col(text("observed"))
            .col(big_integer("generation"))
            .col(text_null("reason"))
            .col(json_binary("metadata"))
            .col(json_binary("versions"))
            .col(timestamp_with_time_zone("created_at"))
            .col(timestamp_with_time_zone_null("started_at"))
            .col(timestamp_with_time_zone_null("last_active_at"))
            .col(timestamp_with_time_zone("last_updated"))
            .foreign_key(&mut belongs("capsules", "team_id", "teams"))
            .foreign_key(&mut belongs("capsules", "host_id", "hosts"))
            .to_owned();
        for table in [teams, api_keys, templates, hosts, capsules] {
            manager.create_table(table).await?;
        }
        let of_team =
            Index::create().name("capsules_of_team").table("capsules").col("team_id").col("created_at").to_owned();
        let of_host =
            Index::create().name("capsules_of_host").table("capsules").col("host_id").col("observed").to_owned();
        manager.create_index(of_team).await?;
        manager.create_index(of_host).await
    }
}

/// Forks, templates that came of capsules, and what hosts still have to forget.
struct Snapshots;

impl MigrationName for Snapshots {
    fn name(&self) -> &str {
        "m0002_snapshots"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Snapshots {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let sized = Table::alter()
            .table("templates")
            // What the templates that are there already are.
            .add_column(integer("disk_size_mb").default(5120))
            .to_owned();
        let forked = Table::alter().table("capsules").add_column(uuid_null("parent_id")).to_owned();
        for table in [sized, forked] {
            manager.alter_table(table).await?;
        }
        // Under the id of the template, whose row is not there yet or not any more.
        let garbage = table("template_garbage")
            .col(uuid("host_id"))
            .col(text("image"))
            // Not before: until then it is still being made.
            .col(timestamp_with_time_zone("due_at"))
            .foreign_key(&mut belongs("template_garbage", "host_id", "hosts"))
            .to_owned();
        manager.create_table(garbage).await
    }
}

/// Who may use a capsule's URLs, and whether that wakes it.
struct Traffic;

impl MigrationName for Traffic {
    fn name(&self) -> &str {
        "m0003_traffic"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Traffic {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // One at a time: SQLite adds no two at once.
        for column in [boolean("auto_resume").default(false).to_owned(), text_null("traffic_token_hash").to_owned()] {
            manager.alter_table(Table::alter().table("capsules").add_column(column).to_owned()).await?;
        }
        Ok(())
    }
}

/// What a capsule may reach outside.
struct Egress;

impl MigrationName for Egress {
    fn name(&self) -> &str {
        "m0004_egress"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Egress {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // None of those that are there already has a limit.
        let column = json_binary_null("egress").to_owned();
        manager.alter_table(Table::alter().table("capsules").add_column(column).to_owned()).await
    }
}
