// The URL fragment selects the open view, so that links and the back button work.
const TITLE = document.title;
const PRINTED = 200;
const view = { place: 0, latent: null };
history.scrollRestoration = "manual";

function route() {
  const latent = /^#latent-(\d+)$/.exec(location.hash)?.[1];
  if (latent !== undefined) openLatent(Number(latent));
  else openOverview();
}

function openLatent(latent) {
  const page = find("latent");
  if (view.latent === null) view.place = scrollY;
  view.latent = latent;
  page.className = "";
  page.replaceChildren(...latentPage(latent));
  find("overview").hidden = true;
  page.hidden = false;
  document.title = `Latent ${latent} · ${TITLE}`;
  page.focus({ preventScroll: true });
  scrollTo(0, page.offsetTop - 16);
}

function openOverview() {
  const from = view.latent;
  view.latent = null;
  find("latent").hidden = true;
  find("overview").hidden = false;
  document.title = TITLE;
  const target = location.hash.length > 1 ? find(location.hash.slice(1)) : null;
  draw();
  if (from === null || (target && target.id !== "latents")) return target?.scrollIntoView();
  scrollTo(0, view.place);
  if (!view.place) target?.scrollIntoView();
  const at = table.order.findIndex((i) => columns.latent[i] === from);
  if (at >= 0) focusRow(at);
}

// Printed pages cannot scroll: print the first rows, whatever was in view.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  table.onPaper = true;
  const rows = table.order.slice(0, PRINTED).map((_, at) => row(at));
  const more = table.order.length - rows.length;
  if (more > 0) rows.push(make("tr", {}, make("td", { colspan: COLUMNS.length, class: "text" }, `and ${more.toLocaleString("en")} more, on the page`)));
  find("table").tBodies[0].replaceChildren(...rows);
});
addEventListener("afterprint", () => {
  table.onPaper = false;
  draw(true);
});
addEventListener("hashchange", route);
addEventListener("resize", () => draw());
openTable();
route();
