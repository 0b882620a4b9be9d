/** The provider "ocp", with the sign-in of `openclaw models auth login --provider ocp`. */
import { createClient, isOcpHealth } from "./client.js";
import { chosenRows, providerEntry } from "./registration.js";
import { addressOf } from "./settings.js";

const ID = "ocp";
const MOST_ATTEMPTS = 3;

const isPort = (text) => /^\d{1,5}$/.test(text) && Number(text) >= 1 && Number(text) <= 65_535;

/** Return what `attempt` resolves to; after an error, note it and try again, three times in all. */
async function repeatedly(prompter, attempt, explained = (error) => error.message) {
  for (let count = 1; ; count += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (count === MOST_ATTEMPTS) throw error;
      await prompter.note(explained(error), "OCP");
    }
  }
}

/** Ask for the proxy until one answers. Returns its address and its health. */
function askAddress(prompter, settings, clientOf) {
  return repeatedly(prompter, async () => {
    const host = (await prompter.text({
      message: "Host of the OCP proxy", initialValue: settings.host,
      validate: (text) => (text.trim() ? undefined : "Enter a host"),
    })).trim();
    const port = (await prompter.text({
      message: "Port", initialValue: String(settings.port),
      validate: (text) => (isPort(text.trim()) ? undefined : "Enter a port from 1 to 65535"),
    })).trim();
    // Only the plugin's settings can name an https proxy.
    const isKnown = host === settings.host && port === String(settings.port);
    const url = isKnown && settings.url ? settings.url : addressOf(host, port);
    const health = await clientOf({ url }, null).get("/health");
    if (!isOcpHealth(health)) throw new Error(`${url} is not an OCP proxy but something else.`);
    return { url, health };
  });
}

/** Ask for the key, null if none is needed, until the proxy accepts it. Returns it and models. */
async function askKey(prompter, url, needsKey, clientOf) {
  const modelsFor = async (key) => ({
    key, rows: (await clientOf({ url }, key).get("/v1/models")).data });
  if (!needsKey) return modelsFor(null);
  return repeatedly(prompter, async () => modelsFor((await prompter.text({
    message: "API key of the proxy (ocp_...)", sensitive: true,
    validate: (text) => (/^[!-~]+$/.test(text.trim()) ? undefined : "Enter the key"),
  })).trim()), (error) => (
    [401, 403].includes(error.status) ? "The proxy does not accept this key." : error.message));
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

/** Return what OpenClaw writes. Without fallbacks, nothing is spent when the proxy is down. */
export function signIn(url, key, rows, first) {
  const ref = `${ID}/${first}`;
  return {
    profiles: key
      ? [{ profileId: `${ID}:default`, credential: { type: "api_key", provider: ID, key } }] : [],
    configPatch: {
      models: { providers: { [ID]: providerEntry(url, rows, Boolean(key)) } },
      // OpenClaw uses this with --set-default only.
      agents: { defaults: { model: { primary: ref, fallbacks: [] } } },
    },
    defaultModel: ref,
    notes: [
      "Fails closed: with --set-default there are no fallbacks. When the proxy is down, OpenClaw "
        + "says so and asks no other provider.",
      "OpenClaw asks the model every 30 minutes (heartbeat), which spends the plan. To stop that: "
        + "openclaw config set agents.defaults.heartbeat.every 0m",
    ],
  };
}

/**
 * Return the provider for api.registerProvider.
 *
 * settingsOf   returns the plugin's settings
 * clientOf     (settings, key) -> client, see client.js
 */
export function createProvider(settingsOf, clientOf = createClient) {
  async function run({ prompter }) {
    const settings = settingsOf();
    const { url, health } = await askAddress(prompter, settings, clientOf);
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
