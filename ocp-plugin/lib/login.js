/** The provider "ocp": how `openclaw models auth login --provider ocp` sets the proxy up. */
import { createClient, isOcpHealth } from "./client.js";
import { chosenRows, providerEntry } from "./registration.js";
import { addressOf } from "./settings.js";

const ID = "ocp";
const MOST_ATTEMPTS = 3;

const isPort = (text) => /^\d{1,5}$/.test(text) && Number(text) >= 1 && Number(text) <= 65_535;

/** The proxy that the user names, and what it says about itself. Throws after a few bad ones. */
async function askPlace(prompter, settings, clientOf) {
  for (let attempt = 1; ; attempt += 1) {
    const host = await prompter.text({
      message: "Host of the OCP proxy", initialValue: settings.host,
      validate: (text) => (text.trim() ? undefined : "Enter a host"),
    });
    const port = await prompter.text({
      message: "Port", initialValue: String(settings.port),
      validate: (text) => (isPort(text.trim()) ? undefined : "Enter a port from 1 to 65535"),
    });
    // An https proxy is one that the plugin's settings name as such.
    const isKnown = host.trim() === settings.host && port.trim() === String(settings.port);
    const url = isKnown && settings.url ? settings.url : addressOf(host.trim(), port.trim());
    try {
      return { url, health: await healthOf(url, clientOf) };
    } catch (error) {
      if (attempt === MOST_ATTEMPTS) throw error;
      await prompter.note(error.message, "OCP");
    }
  }
}

async function healthOf(url, clientOf) {
  const health = await clientOf({ url }, null).get("/health");
  if (!isOcpHealth(health)) throw new Error(`${url} is something else than an OCP proxy.`);
  return health;
}

/** The models that the proxy serves, and the key that opens it, null where none is wanted. */
async function askKey(prompter, url, needsKey, clientOf) {
  for (let attempt = 1; ; attempt += 1) {
    const key = needsKey ? (await prompter.text({
      message: "API key of the proxy (ocp_...)", sensitive: true,
      validate: (text) => (/^[!-~]+$/.test(text.trim()) ? undefined : "Enter the key"),
    })).trim() : null;
    try {
      return { key, rows: (await clientOf({ url }, key).get("/v1/models")).data };
    } catch (error) {
      if (!needsKey || attempt === MOST_ATTEMPTS) throw error;
      const refused = error.status === 401 || error.status === 403;
      await prompter.note(refused ? "The proxy does not accept this key." : error.message, "OCP");
    }
  }
}

async function askModels(prompter, offered) {
  const options = offered.map((row) => ({ value: row.id, label: row.display_name ?? row.id }));
  const picked = await prompter.multiselect({
    message: "Models to use", options, initialValues: options.map((option) => option.value) });
  const rows = picked.length ? chosenRows(offered, picked) : offered;
  if (rows.length === 1) return { rows, first: rows[0].id };
  const first = await prompter.select({
    message: "Default model", initialValue: rows[0].id,
    options: options.filter((option) => rows.some((row) => row.id === option.value)) });
  return { rows, first };
}

/** What OpenClaw is to write. Its fallbacks are empty: when the proxy is down, nothing is spent. */
export function signIn(url, key, rows, first) {
  const ref = `${ID}/${first}`;
  return {
    profiles: key
      ? [{ profileId: `${ID}:default`, credential: { type: "api_key", provider: ID, key } }] : [],
    configPatch: {
      models: { providers: { [ID]: providerEntry(url, rows, Boolean(key)) } },
      // OpenClaw takes this with --set-default only.
      agents: { defaults: { model: { primary: ref, fallbacks: [] } } },
    },
    defaultModel: ref,
    notes: [
      "Fails closed: with --set-default there are no fallbacks. When the proxy is down, OpenClaw "
        + "says so and asks nobody else.",
      "OpenClaw asks the model every 30 minutes by itself (heartbeat), which spends the plan: "
        + "openclaw config set agents.defaults.heartbeat.every 0m",
    ],
  };
}

/**
 * The provider for api.registerProvider.
 *
 * settingsOf   gives the plugin's settings
 * clientOf     (settings, key) -> client, see client.js
 */
export function createProvider(settingsOf, clientOf = createClient) {
  async function run({ prompter }) {
    const settings = settingsOf();
    const { url, health } = await askPlace(prompter, settings, clientOf);
    const needsKey = health.authMode !== "none";
    const { key, rows: all } = await askKey(prompter, url, needsKey, clientOf);
    const offered = chosenRows(all, settings.models);
    const { rows, first } = await askModels(prompter, offered.length ? offered : all);
    return signIn(url, key, rows, first);
  }

  return {
    id: ID,
    label: "OCP",
    aliases: ["claude-max-proxy"],
    auth: [{
      id: "local", label: "OCP proxy", hint: "Host, port, key and models", kind: "custom", run,
    }],
    wizard: { setup: {
      choiceId: ID, choiceLabel: "OCP (Claude plan through the claude program)",
      choiceHint: "Host, port, key and models of an OCP proxy", methodId: "local",
    } },
  };
}
