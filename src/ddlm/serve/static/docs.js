// The description of the API, drawn from openapi.json without anything from elsewhere.

const BODIES = {
  "/v1/generate": { template: "The river {24} the sea.", steps: 100, halt: "patience:25", seed: 0 },
  "/v1/completions": { prompt: "The river", suffix: " the sea.", max_tokens: 24, seed: 0 },
};

function add(parent, name, text) {
  const el = document.createElement(name);
  if (text !== undefined) el.textContent = text;
  parent.append(el);
  return el;
}

function kind(schema) {
  const parts = schema.anyOf ?? schema.oneOf;
  if (parts) return parts.map(kind).join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.const !== undefined) return String(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items ?? {})}`;
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const high = schema.maximum;
  const range = low !== undefined && high !== undefined ? ` ${low}..${high}` : low !== undefined ? ` from ${low}` : "";
  return `${schema.type ?? "any"}${range}`;
}

const api = await (await fetch("/openapi.json")).json();
const routes = document.getElementById("routes");
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, route] of Object.entries(methods)) {
    const card = add(routes, "article");
    const title = add(card, "h2");
    add(title, "b", method.toUpperCase());
    title.append(path);
    add(card, "p", (route.description ?? "").replaceAll("``", ""));
    const reference = route.requestBody?.content["application/json"]?.schema?.$ref;
    if (!reference) continue;
    const schema = api.components.schemas[reference.split("/").pop()];
    const table = add(add(card, "div"), "table");
    table.parentElement.className = "wide";
    const head = add(table, "tr");
    for (const name of ["field", "type", "default", "meaning"]) add(head, "th", name);
    for (const [name, field] of Object.entries(schema.properties)) {
      const row = add(table, "tr");
      add(add(row, "td"), "code", name);
      add(row, "td", kind(field));
      const needed = schema.required?.includes(name);
      add(row, "td", needed ? "required" : JSON.stringify(field.default) ?? "").classList.toggle("needed", Boolean(needed));
      add(row, "td", field.description ?? "");
    }
    if (BODIES[path]) {
      add(card, "pre", `curl ${location.origin}${path} -H 'content-type: application/json' \\\n  -d '${JSON.stringify(BODIES[path])}'`);
    }
  }
}
